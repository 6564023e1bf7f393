// bench_kernels.cpp: how fast rows are multiplied (dot) and added (axpy), in GB/s of row bytes, against a plain read
// of the same memory. Rows are visited in order (contiguous), in random order as active neurons are (scattered), and
// from a few rows that stay in the cache, which shows what the arithmetic alone could do. Every kernel is checked
// before it is timed.
//
//   bench_kernels [-n ROW_LENGTH] [-t THREADS] [-r REPETITIONS] [--mib MIB] [--type NAME]
#include "ggml-cpu.h"
#include "tables.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <string>
#include <vector>

static const enum ggml_type TYPES[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,   GGML_TYPE_IQ4_NL,
    GGML_TYPE_IQ4_XS,
};

constexpr int64_t ROWS_IN_CACHE = 32;
constexpr int     WARM_UP       = 2;

struct options {
    int64_t     n           = 4096;
    int         threads     = 1;
    int         repetitions = 9;
    size_t      bytes       = (size_t) 256 << 20;
    std::string type;
};

struct spread {
    double median, low, high;
};

// One pass is timed per repetition; the warm-up passes are not counted.
template <typename F> static spread gigabytes_per_second(const options & o, double bytes, F pass) {
    std::vector<double> rates;
    for (int i = 0; i < o.repetitions + WARM_UP; i++) {
        const auto start = std::chrono::steady_clock::now();
        pass();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (i >= WARM_UP) {
            rates.push_back(bytes / seconds.count() / 1e9);
        }
    }
    std::sort(rates.begin(), rates.end());
    return { rates[rates.size() / 2], rates.front(), rates.back() };
}

static volatile uint64_t sink;

static spread bench_read(const options & o, const std::vector<uint64_t> & memory) {
    const int64_t n = (int64_t) memory.size();
    return gigabytes_per_second(o, (double) n * 8.0, [&] {
        uint64_t sum = 0;
#pragma omp parallel for num_threads(o.threads) reduction(+ : sum) schedule(static)
        for (int64_t i = 0; i < n; i++) {
            sum += memory[(size_t) i];
        }
        sink = sum;
    });
}

struct rows {
    const uint8_t *      data;
    size_t               stride;
    std::vector<int64_t> order;

    const uint8_t * at(int64_t i) const { return data + (size_t) order[(size_t) i] * stride; }
};

static spread bench_dot(const options & o, const struct pinfer_kernel * k, const rows & r, const void * x) {
    const int64_t n_rows = (int64_t) r.order.size();
    return gigabytes_per_second(o, (double) r.stride * (double) n_rows, [&] {
        double sum = 0.0;
#pragma omp parallel for num_threads(o.threads) reduction(+ : sum) schedule(static)
        for (int64_t i = 0; i < n_rows; i++) {
            sum += pinfer_kernel_dot(k, o.n, r.at(i), x);
        }
        sink = (uint64_t) fabs(sum);
    });
}

static spread bench_axpy(const options & o, const struct pinfer_kernel * k, const rows & r) {
    const int64_t n_rows = (int64_t) r.order.size();
    return gigabytes_per_second(o, (double) r.stride * (double) n_rows, [&] {
        double sum = 0.0;
#pragma omp parallel num_threads(o.threads) reduction(+ : sum)
        {
            std::vector<float> y((size_t) o.n), scratch((size_t) o.n);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n_rows; i++) {
                pinfer_kernel_axpy(k, o.n, i % 2 ? 0.5f : -0.5f, r.at(i), y.data(), scratch.data());
            }
            sum += y[0];
        }
        sink = (uint64_t) fabs(sum);
    });
}

static std::vector<float> random_values(int64_t n, std::mt19937_64 * rng) {
    std::normal_distribution<float> normal;
    std::vector<float>              v((size_t) n);
    for (float & f : v) {
        f = normal(*rng);
    }
    return v;
}

// Fast but wrong is worth nothing: dot and axpy of one row against float64, to a relative error that no working
// kernel nears (the tests hold them to the exact bound).
static bool is_right(const options & o, const struct pinfer_kernel * k, const void * row,
                     const std::vector<float> & x) {
    std::vector<float> w((size_t) o.n), y((size_t) o.n), scratch((size_t) o.n);
    if (k->type == GGML_TYPE_F32) {
        memcpy(w.data(), row, w.size() * sizeof(float));
    } else {
        ggml_get_type_traits(k->type)->to_float(row, w.data(), o.n);
    }
    std::vector<uint8_t> prepared(pinfer_kernel_prepared_size(k->x_type, o.n));
    pinfer_kernel_prepare(k->x_type, x.data(), prepared.data(), o.n);
    pinfer_kernel_axpy(k, o.n, 2.0f, row, y.data(), scratch.data());
    double expected = 0.0, square = 0.0, axpy_error = 0.0;
    for (size_t i = 0; i < w.size(); i++) {
        expected += (double) w[i] * x[i];
        square += pow((double) w[i] * x[i], 2);
        axpy_error = std::max(axpy_error, fabs(y[i] - 2.0 * w[i]));
    }
    const double dot_error = fabs(pinfer_kernel_dot(k, o.n, row, prepared.data()) - expected);
    return dot_error <= 0.05 * sqrt(square) && axpy_error <= 1e-5; // x loses up to 1/127 of its largest value
}

static void print(const spread & s) {
    printf("  %6.2f (%.2f-%.2f)", s.median, s.low, s.high);
}

static bool bench_type(const options & o, enum ggml_type type, std::vector<uint64_t> * memory) {
    const struct pinfer_kernel * k = pinfer_kernel_get(type);
    if (k == nullptr || o.n % ggml_blck_size(type) != 0) {
        fprintf(stderr, "bench_kernels: %s has no rows of %lld\n", ggml_type_name(type), (long long) o.n);
        return false;
    }
    std::mt19937_64 rng(1);
    rows            r      = { (const uint8_t *) memory->data(), ggml_row_size(type, o.n), {} };
    const int64_t   n_rows = (int64_t) (o.bytes / r.stride);
    uint8_t *       data   = (uint8_t *) memory->data();
    const int64_t   unique = std::min<int64_t>(n_rows, 64); // quantising all of them would take longer than the bench
    const auto      values = random_values(o.n * unique, &rng);
    ggml_quantize_chunk(type, values.data(), data, 0, unique, o.n, nullptr);
    for (int64_t i = unique; i < n_rows; i++) {
        memcpy(data + (size_t) i * r.stride, data + (size_t) (i % unique) * r.stride, r.stride);
    }
    const std::vector<float> x = random_values(o.n, &rng);
    for (int64_t i = 0; i < unique; i++) {
        if (!is_right(o, k, data + (size_t) i * r.stride, x)) {
            fprintf(stderr, "bench_kernels: %s is wrong in row %lld\n", ggml_type_name(type), (long long) i);
            return false;
        }
    }
    std::vector<uint8_t> prepared(pinfer_kernel_prepared_size(k->x_type, o.n));
    pinfer_kernel_prepare(k->x_type, x.data(), prepared.data(), o.n);

    r.order.resize((size_t) n_rows);
    std::iota(r.order.begin(), r.order.end(), 0);
    const spread dot_contiguous = bench_dot(o, k, r, prepared.data()), axpy_contiguous = bench_axpy(o, k, r);
    std::shuffle(r.order.begin(), r.order.end(), rng);
    const spread dot_scattered = bench_dot(o, k, r, prepared.data()), axpy_scattered = bench_axpy(o, k, r);
    for (int64_t i = 0; i < n_rows; i++) {
        r.order[(size_t) i] = i % ROWS_IN_CACHE;
    }
    const spread dot_cached = bench_dot(o, k, r, prepared.data()), axpy_cached = bench_axpy(o, k, r);

    printf("%-8s %-5s dot ", ggml_type_name(type), k->dot ? "own" : "ggml");
    print(dot_contiguous);
    print(dot_scattered);
    print(dot_cached);
    printf("\n%-8s %-5s axpy", "", "");
    print(axpy_contiguous);
    print(axpy_scattered);
    print(axpy_cached);
    printf("\n");
    fflush(stdout);
    return true;
}

// First line that a command prints, "unknown" if it prints none.
static std::string first_line(const char * command) {
    char   line[256] = "";
    FILE * pipe      = popen(command, "r");
    if (pipe != nullptr) {
        if (fgets(line, sizeof(line), pipe) == nullptr) {
            line[0] = '\0';
        }
        pclose(pipe);
    }
    line[strcspn(line, "\n")] = '\0';
    return line[0] ? line : "unknown";
}

static bool parse(int argc, char ** argv, options * o) {
    for (int i = 1; i < argc; i += 2) {
        const std::string flag  = argv[i];
        const char *      value = i + 1 < argc ? argv[i + 1] : "";
        if (flag == "-n") {
            o->n = atoll(value);
        } else if (flag == "-t") {
            o->threads = atoi(value);
        } else if (flag == "-r") {
            o->repetitions = atoi(value);
        } else if (flag == "--mib") {
            o->bytes = (size_t) atoll(value) << 20;
        } else if (flag == "--type") {
            o->type = value;
        } else {
            return false;
        }
    }
    const size_t largest_row = (size_t) std::max<int64_t>(o->n, 0) * sizeof(float);
    return o->n > 0 && o->threads > 0 && o->repetitions > 0 && o->bytes >= largest_row * (size_t) ROWS_IN_CACHE;
}

int main(int argc, char ** argv) {
    options o;
    if (!parse(argc, argv, &o)) {
        fprintf(stderr, "usage: bench_kernels [-n ROW_LENGTH] [-t THREADS] [-r REPETITIONS] [--mib MIB] "
                        "[--type NAME]\n");
        return 2;
    }
    std::vector<uint64_t> memory(o.bytes / 8 + 1, 1);
    printf("commit   %s\n", first_line("git describe --always --dirty 2>/dev/null").c_str());
    printf("machine  %s\n", first_line("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null").c_str());
    printf("kernels  %s, %d thread(s), rows of %lld, %zu MiB, %d repetitions\n", pinfer_kernel_isa(), o.threads,
           (long long) o.n, o.bytes >> 20, o.repetitions);
    printf("read    ");
    print(bench_read(o, memory));
    printf(" GB/s\n%-19s  contiguous            scattered             in cache: median GB/s (lowest-highest)\n", "");
    bool ok = true, found = false;
    for (const enum ggml_type type : TYPES) {
        if (o.type.empty() || o.type == ggml_type_name(type)) {
            found = true;
            ok    = bench_type(o, type, &memory) && ok;
        }
    }
    if (!found) {
        fprintf(stderr, "bench_kernels: no type %s\n", o.type.c_str());
    }
    return ok && found ? 0 : 1;
}
