// bench_attention.cpp: decode attention over caches larger than the processor's, by ggml and by the plugin in turn.
//
// Each case is a graph of as many layers as it takes to fill --mib, one query each. Printed is the best of the repetitions of
// either side in GB/s of K and V, beside a plain read of as much memory.
//
// With one thread it is CPU time that is measured: what other processes take of a shared machine does not count.
//
//   bench_attention [-t THREADS] [-r REPETITIONS] [--mib MIB] [--type NAME|all]
#include "attention.h"
#include "attention_case.h"
#include "model.h"

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <omp.h>

struct options {
    int         threads     = 2;
    int         repetitions = 9;
    size_t      bytes       = (size_t) 256 << 20;
    std::string type        = "f16";
};

static double now(const options & o) {
    timespec t;
    clock_gettime(o.threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

template <typename F> static double seconds(const options & o, F && f) {
    const double start = now(o);
    f();
    return now(o) - start;
}

static volatile uint64_t sink;

static double read_rate(const options & o) {
    const std::vector<uint64_t> memory(o.bytes / 8, 1);
    double                      best = 1e9;
    for (int i = 0; i < o.repetitions; i++) {
        best = std::min(best, seconds(o, [&] {
            uint64_t sum = 0;
#pragma omp parallel for num_threads(o.threads) reduction(+ : sum) schedule(static)
            for (size_t j = 0; j < memory.size(); j++) {
                sum += memory[j];
            }
            sink = sum;
        }));
    }
    return (double) o.bytes / best / 1e9;
}

static void bench_shape(const options & o, attention_shape s, double read) {
    random_source random = {1};
    std::vector<std::unique_ptr<attention_case>> layers;
    std::vector<ggml_tensor *>                   ops;
    size_t                                       bytes = 0;
    const auto sees = [&](int64_t, int64_t, int64_t) { return true; };
    while (bytes < o.bytes) {
        layers.push_back(std::make_unique<attention_case>(s, &random, sees));
        ops.push_back(layers.back()->op);
        bytes += layers.back()->cache_bytes();
    }
    static pinfer_model model;
    attention_runner    runner;
    double              best[2] = {1e9, 1e9};
    for (int i = 0; i < o.repetitions; i++) {
        for (int ours : {0, 1}) {
            if (ours) {
                pinfer_model_hold(&model);
            }
            best[ours] = std::min(best[ours], seconds(o, [&] { runner.compute(ops, o.threads); }));
            if (ours) {
                pinfer_model_let_go(&model);
            }
        }
    }
    printf("| %s | %lld/%lld × %lld | %lld | %.1f | %.1f | %.2f | %.0f %% |\n", ggml_type_name(s.k_type), (long long) s.n_heads,
           (long long) s.n_kv_heads, (long long) s.k_size, (long long) s.n_positions, (double) bytes / best[0] / 1e9,
           (double) bytes / best[1] / 1e9, best[0] / best[1], 100.0 * (double) bytes / best[1] / 1e9 / read);
    fflush(stdout);
}

int main(int argc, char ** argv) {
    options o;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string flag = argv[i], value = argv[i + 1];
        if (flag == "-t") {
            o.threads = std::max(1, atoi(value.c_str()));
        } else if (flag == "-r") {
            o.repetitions = std::max(1, atoi(value.c_str()));
        } else if (flag == "--mib") {
            o.bytes = (size_t) std::max(1, atoi(value.c_str())) << 20;
        } else if (flag == "--type") {
            o.type = value;
        }
    }
    setenv("PINFER_ATTENTION", "always", 1);
    pinfer_attention_install();
    const double read = read_rate(o);
    printf("%d threads, plain read %.1f GB/s\n", o.threads, read);
    printf("| cache | heads × size | positions | ggml GB/s | plugin GB/s | plugin ÷ ggml | of plain read |\n");
    printf("|---|---|---:|---:|---:|---:|---:|\n");
    for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        if (o.type != "all" && o.type != ggml_type_name(type)) {
            continue;
        }
        for (int64_t n_kv_heads : {16, 8}) {
            for (int64_t n : {512, 2048, 8192}) {
                bench_shape(o, {.n_heads = n_kv_heads == 16 ? 16 : 32, .n_kv_heads = n_kv_heads, .n_positions = n,
                                .k_type = type, .v_type = type}, read);
            }
        }
    }
    return 0;
}
