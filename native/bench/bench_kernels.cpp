// bench_kernels.cpp: how fast the kernels are, with each instruction set of this machine (PINFER_ISA: with one).
//
// Single rows are multiplied (dot) and added (axpy), in GB/s of row bytes, against a plain read of the same memory.
// Rows are visited in order (contiguous), in random order as active neurons are (scattered), and from a few rows that
// stay in the cache, which shows what the arithmetic alone could do.
//
// Batches are measured in 10^9 multiply-adds a second, on 16 rows in the cache and 1, 4 or 32 tokens: a tile
// multiplied, the same with its packing, and rows multiplied (dot_many) and added (accumulate) without tiles.
//
// Every kernel is checked before it is timed.
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
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

static const enum ggml_type TYPES[] = {
    GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
};

static const int64_t TOKENS[] = { 1, 4, 32 };

constexpr int64_t ROWS_IN_CACHE = 32;
constexpr int64_t UNIQUE_ROWS   = 64; // quantising all of them would take longer than the bench
constexpr int64_t MOST_TOKENS   = 32;
constexpr int     WARM_UP       = 1;

struct options {
    int64_t     n           = 4096;
    int         threads     = 1;
    int         repetitions = 5;
    size_t      bytes       = (size_t) 128 << 20;
    std::string type;
};

struct spread {
    double median, low, high;
};

// 10^9 of whatever `amount` counts, a second. One pass is timed per repetition; the warm-up passes are not counted.
template <typename F> static spread rate(const options & o, double amount, F pass) {
    std::vector<double> rates;
    for (int i = 0; i < o.repetitions + WARM_UP; i++) {
        const auto start = std::chrono::steady_clock::now();
        pass();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (i >= WARM_UP) {
            rates.push_back(amount / seconds.count() / 1e9);
        }
    }
    std::sort(rates.begin(), rates.end());
    return { rates[rates.size() / 2], rates.front(), rates.back() };
}

static volatile uint64_t sink;

static spread bench_read(const options & o, const std::vector<uint64_t> & memory) {
    const int64_t n = (int64_t) memory.size();
    return rate(o, (double) n * 8.0, [&] {
        uint64_t sum = 0;
#pragma omp parallel for num_threads(o.threads) reduction(+ : sum) schedule(static)
        for (int64_t i = 0; i < n; i++) {
            sum += memory[(size_t) i];
        }
        sink = sum;
    });
}

// ---- what is multiplied ------------------------------------------------------------------------------------------

static std::vector<float> random_values(int64_t n, std::mt19937_64 * rng) {
    std::normal_distribution<float> normal;
    std::vector<float>              v((size_t) n);
    for (float & f : v) {
        f = normal(*rng);
    }
    return v;
}

// Rows that fill the memory, and MOST_TOKENS x as they are and prepared.
struct sample {
    const struct pinfer_kernel * kernel;
    const uint8_t *              data;
    size_t                       stride;
    int64_t                      n_rows;
    std::vector<float>           x;
    std::vector<uint8_t>         prepared;
    size_t                       x_row;
    std::vector<const void *>    first; // PINFER_TILE_ROWS rows

    const uint8_t * row(int64_t i) const { return data + (size_t) i * stride; }
};

static sample make_sample(const options & o, const struct pinfer_kernel_table * table, enum ggml_type type,
                          std::vector<uint64_t> * memory) {
    const struct pinfer_kernel * own = pinfer_kernel_table_find(table, type);
    std::mt19937_64              rng(1);
    sample                       s = {};
    s.kernel                       = own != nullptr ? own : pinfer_kernel_get(type);
    s.data                         = (const uint8_t *) memory->data();
    s.stride                       = ggml_row_size(type, o.n);
    s.n_rows                       = (int64_t) (o.bytes / s.stride);
    uint8_t *     data             = (uint8_t *) memory->data();
    const int64_t unique           = std::min(s.n_rows, UNIQUE_ROWS);
    const auto    values           = random_values(o.n * unique, &rng);
    ggml_quantize_chunk(type, values.data(), data, 0, unique, o.n, nullptr);
    for (int64_t i = unique; i < s.n_rows; i++) {
        memcpy(data + (size_t) i * s.stride, data + (size_t) (i % unique) * s.stride, s.stride);
    }
    for (int64_t i = 0; i < PINFER_TILE_ROWS; i++) {
        s.first.push_back(s.row(i));
    }
    s.x     = random_values(o.n * MOST_TOKENS, &rng);
    s.x_row = pinfer_kernel_prepared_size(s.kernel->x_type, o.n);
    s.prepared.resize(s.x_row * (size_t) MOST_TOKENS);
    for (int64_t t = 0; t < MOST_TOKENS; t++) {
        const float * x   = &s.x[(size_t) (t * o.n)];
        uint8_t *     dst = &s.prepared[(size_t) t * s.x_row];
        if (s.kernel->x_type == PINFER_X_Q8) {
            table->prepare_x_q8(x, dst, o.n);
        } else {
            pinfer_kernel_prepare(s.kernel->x_type, x, dst, o.n);
        }
    }
    return s;
}

// One thread's memory for batches.
struct free_memory {
    void operator()(void * p) const { free(p); }
};

struct buffers {
    std::vector<float>                 out, y, a, scratch;
    std::unique_ptr<void, free_memory> tile;

    explicit buffers(int64_t n)
        : out((size_t) (PINFER_TILE_ROWS * MOST_TOKENS)), y((size_t) (n * MOST_TOKENS)), scratch((size_t) n),
          tile(aligned_alloc(64, pinfer_tile_size((n + 31) / 32 * 32))) {
        std::mt19937_64 rng(2);
        a = random_values(PINFER_TILE_ROWS * MOST_TOKENS, &rng);
    }
};

static void pack_tile(const options & o, const sample & s, buffers * b) {
    s.kernel->pack(0, o.n, s.first.data(), b->tile.get());
}

static void multiply_tile(const options & o, const sample & s, int64_t n_tokens, buffers * b) {
    s.kernel->multiply(o.n, 0, o.n, b->tile.get(), s.prepared.data(), s.x_row, n_tokens, b->out.data(),
                       PINFER_TILE_ROWS);
}

static void dot_rows(const options & o, const sample & s, int64_t n_tokens, buffers * b) {
    for (size_t r = 0; r < s.first.size(); r++) {
        pinfer_kernel_dot_many(s.kernel, o.n, s.first[r], s.prepared.data(), s.x_row, n_tokens,
                               &b->out[r * (size_t) n_tokens]);
    }
}

static void accumulate_rows(const options & o, const sample & s, int64_t n_tokens, buffers * b) {
    pinfer_kernel_accumulate(s.kernel, o.n, PINFER_TILE_ROWS, s.first.data(), b->a.data(), n_tokens, b->y.data(),
                             b->scratch.data());
}

// ---- checks ------------------------------------------------------------------------------------------------------

// Fast but wrong is worth nothing: a result against float64, to a relative error that no working kernel nears (the
// tests hold them to the exact bound). x loses up to 1/127 of its largest value.
struct expected_dot {
    double sum = 0.0, square = 0.0;

    bool is(double got) const { return fabs(got - sum) <= 0.05 * sqrt(square); }
};

static std::vector<float> row_values(const options & o, const sample & s, int64_t row) {
    std::vector<float> w((size_t) o.n);
    if (s.kernel->type == GGML_TYPE_F32) {
        memcpy(w.data(), s.row(row), w.size() * sizeof(float));
    } else {
        ggml_get_type_traits(s.kernel->type)->to_float(s.row(row), w.data(), o.n);
    }
    return w;
}

static expected_dot expect_dot(const options & o, const sample & s, const std::vector<float> & w, int64_t token) {
    expected_dot e;
    for (int64_t i = 0; i < o.n; i++) {
        const double term = (double) w[(size_t) i] * s.x[(size_t) (token * o.n + i)];
        e.sum += term;
        e.square += term * term;
    }
    return e;
}

static bool row_is_right(const options & o, const sample & s, int64_t row) {
    const std::vector<float> w = row_values(o, s, row);
    std::vector<float>       y((size_t) o.n), scratch((size_t) o.n);
    pinfer_kernel_axpy(s.kernel, o.n, 2.0f, s.row(row), y.data(), scratch.data());
    double axpy_error = 0.0;
    for (size_t i = 0; i < w.size(); i++) {
        axpy_error = std::max(axpy_error, fabs(y[i] - 2.0 * w[i]));
    }
    const float dot = pinfer_kernel_dot(s.kernel, o.n, s.row(row), s.prepared.data());
    return expect_dot(o, s, w, 0).is(dot) && axpy_error <= 1e-5;
}

static bool batch_is_right(const options & o, const sample & s) {
    buffers            b(o.n), tile(o.n);
    std::vector<float> y((size_t) (o.n * MOST_TOKENS));
    bool               ok = true;
    dot_rows(o, s, MOST_TOKENS, &b);
    accumulate_rows(o, s, MOST_TOKENS, &b);
    if (s.kernel->pack != nullptr) {
        pack_tile(o, s, &tile);
        multiply_tile(o, s, MOST_TOKENS, &tile);
    }
    for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
        const std::vector<float> w = row_values(o, s, r);
        for (int64_t t = 0; t < MOST_TOKENS; t++) {
            const expected_dot e = expect_dot(o, s, w, t);
            ok = ok && e.is(b.out[(size_t) (r * MOST_TOKENS + t)]);
            ok = ok && (s.kernel->pack == nullptr || e.is(tile.out[(size_t) (t * PINFER_TILE_ROWS + r)]));
            for (int64_t i = 0; i < o.n; i++) {
                y[(size_t) (t * o.n + i)] += b.a[(size_t) (r * MOST_TOKENS + t)] * w[(size_t) i];
            }
        }
    }
    for (size_t i = 0; i < y.size(); i++) {
        ok = ok && fabs(y[i] - b.y[i]) <= 1e-3;
    }
    return ok;
}

// ---- single rows -------------------------------------------------------------------------------------------------

static spread bench_dot(const options & o, const sample & s, const std::vector<int64_t> & order) {
    const int64_t n_rows = (int64_t) order.size();
    return rate(o, (double) s.stride * (double) n_rows, [&] {
        double sum = 0.0;
#pragma omp parallel for num_threads(o.threads) reduction(+ : sum) schedule(static)
        for (int64_t i = 0; i < n_rows; i++) {
            sum += pinfer_kernel_dot(s.kernel, o.n, s.row(order[(size_t) i]), s.prepared.data());
        }
        sink = (uint64_t) fabs(sum);
    });
}

static spread bench_axpy(const options & o, const sample & s, const std::vector<int64_t> & order) {
    const int64_t n_rows = (int64_t) order.size();
    return rate(o, (double) s.stride * (double) n_rows, [&] {
        double sum = 0.0;
#pragma omp parallel num_threads(o.threads) reduction(+ : sum)
        {
            std::vector<float> y((size_t) o.n), scratch((size_t) o.n);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n_rows; i++) {
                const float a = i % 2 ? 0.5f : -0.5f;
                pinfer_kernel_axpy(s.kernel, o.n, a, s.row(order[(size_t) i]), y.data(), scratch.data());
            }
            sum += y[0];
        }
        sink = (uint64_t) fabs(sum);
    });
}

static void print(const spread & s) {
    printf("  %6.2f (%6.2f-%6.2f)", s.median, s.low, s.high);
}

// `of`: what 100 percent are, 0 for none.
static void print_line(const char * type, const char * what, const spread * s, double of) {
    printf("%-8s %-10s", type, what);
    for (int i = 0; i < 3; i++) {
        print(s[i]);
    }
    if (of > 0.0) {
        printf("  %3.0f%% %3.0f%%", 100.0 * s[0].median / of, 100.0 * s[1].median / of);
    }
    printf("\n");
    fflush(stdout);
}

static void bench_rows(const options & o, const sample & s, double read) {
    std::vector<int64_t> contiguous((size_t) s.n_rows), scattered, cached;
    std::iota(contiguous.begin(), contiguous.end(), 0);
    scattered = cached = contiguous;
    std::mt19937_64 rng(3);
    std::shuffle(scattered.begin(), scattered.end(), rng);
    for (int64_t & i : cached) {
        i %= ROWS_IN_CACHE;
    }
    spread dot[3], axpy[3];
    int    i = 0;
    for (const std::vector<int64_t> * order : { &contiguous, &scattered, &cached }) {
        dot[i]    = bench_dot(o, s, *order);
        axpy[i++] = bench_axpy(o, s, *order);
    }
    print_line(ggml_type_name(s.kernel->type), "dot", dot, read);
    print_line("", "axpy", axpy, read);
}

// ---- batches -----------------------------------------------------------------------------------------------------

// Each thread does the whole work on its own buffers.
template <typename F>
static void bench_batch(const options & o, const sample & s, const char * type, const char * what, F call) {
    std::vector<buffers> memory;
    for (int i = 0; i < o.threads; i++) {
        memory.emplace_back(o.n);
        if (s.kernel->pack != nullptr) {
            pack_tile(o, s, &memory.back());
        }
    }
    spread rates[3];
    int    i = 0;
    for (const int64_t n_tokens : TOKENS) {
        const double  products = (double) (o.n * PINFER_TILE_ROWS * n_tokens);
        const int64_t times    = (int64_t) (5e7 / products) + 1;
        rates[i++] = rate(o, products * (double) times * o.threads, [&] {
#pragma omp parallel num_threads(o.threads)
            for (int64_t k = 0; k < times; k++) {
                call(n_tokens, &memory[(size_t) omp_get_thread_num()]);
            }
        });
    }
    print_line(type, what, rates, 0.0);
}

static void bench_batches(const options & o, const sample & s) {
    const char * name = ggml_type_name(s.kernel->type);
    if (s.kernel->pack != nullptr) {
        bench_batch(o, s, name, "tile", [&](int64_t n_tokens, buffers * b) { multiply_tile(o, s, n_tokens, b); });
        bench_batch(o, s, "", "packed", [&](int64_t n_tokens, buffers * b) {
            pack_tile(o, s, b);
            multiply_tile(o, s, n_tokens, b);
        });
        name = "";
    }
    bench_batch(o, s, name, "dot_many", [&](int64_t n_tokens, buffers * b) { dot_rows(o, s, n_tokens, b); });
    bench_batch(o, s, "", "accumulate", [&](int64_t n_tokens, buffers * b) { accumulate_rows(o, s, n_tokens, b); });
}

// ---- the program -------------------------------------------------------------------------------------------------

static bool bench_table(const options & o, const struct pinfer_kernel_table * table,
                        const std::vector<enum ggml_type> & types, std::vector<uint64_t> * memory) {
    const spread read[3] = { bench_read(o, *memory), {}, {} };
    printf("\n%s, GB/s\n", table->isa);
    printf("%-19s", "plain read");
    print(read[0]);
    printf("\n%-19s  %-22s  %-22s  %-22s  of the read\n", "", "contiguous", "scattered", "in cache");
    bool ok = true;
    for (const enum ggml_type type : types) {
        const sample s     = make_sample(o, table, type, memory);
        bool         right = batch_is_right(o, s);
        for (int64_t i = 0; i < std::min(s.n_rows, UNIQUE_ROWS); i++) {
            right = right && row_is_right(o, s, i);
        }
        if (!right) {
            fprintf(stderr, "bench_kernels: %s of %s is wrong\n", ggml_type_name(type), table->isa);
            ok = false;
        }
        bench_rows(o, s, read[0].median);
    }
    printf("\n%s, 10^9 multiply-adds/s\n%-19s  %-22s  %-22s  %s\n", table->isa, "", "1 token", "4 tokens", "32 tokens");
    for (const enum ggml_type type : types) {
        bench_batches(o, make_sample(o, table, type, memory));
    }
    return ok;
}

// The table that PINFER_ISA asks for, else all but the reference.
static std::vector<const struct pinfer_kernel_table *> tables_to_bench(void) {
    size_t                                           n;
    const struct pinfer_kernel_table * const *       all    = pinfer_kernel_tables(&n);
    const char *                                     forced = getenv("PINFER_ISA");
    std::vector<const struct pinfer_kernel_table *> chosen;
    for (size_t i = 0; i < n; i++) {
        const bool in_use = strcmp(all[i]->isa, pinfer_kernel_isa()) == 0;
        if (forced != nullptr && forced[0] != '\0' ? in_use : i + 1 < n || n == 1) {
            chosen.push_back(all[i]);
        }
    }
    return chosen;
}

// The types asked for that have rows of n; empty with a message if there is none.
static std::vector<enum ggml_type> types_to_bench(const options & o) {
    std::vector<enum ggml_type> types;
    if (o.type.empty()) {
        types.assign(std::begin(TYPES), std::end(TYPES));
    }
    for (int i = 0; i < GGML_TYPE_COUNT && !o.type.empty(); i++) {
        const char * name = ggml_type_name((enum ggml_type) i);
        if (name != nullptr && o.type == name && pinfer_kernel_get((enum ggml_type) i) != nullptr) {
            types.push_back((enum ggml_type) i);
        }
    }
    std::erase_if(types, [&](enum ggml_type type) { return o.n % ggml_blck_size(type) != 0; });
    if (types.empty()) {
        fprintf(stderr, "bench_kernels: no type %s with rows of %lld\n", o.type.c_str(), (long long) o.n);
    }
    return types;
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
    const std::vector<enum ggml_type> types = types_to_bench(o);
    if (types.empty()) {
        return 1;
    }
    std::vector<uint64_t> memory(o.bytes / 8 + 1, 1);
    printf("commit   %s\n", first_line("git describe --always --dirty 2>/dev/null").c_str());
    printf("machine  %s\n", first_line("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null").c_str());
    printf("kernels  %d thread(s), rows of %lld, %zu MiB, median (lowest-highest) of %d\n", o.threads, (long long) o.n,
           o.bytes >> 20, o.repetitions);
    bool ok = true;
    for (const struct pinfer_kernel_table * table : tables_to_bench()) {
        ok = bench_table(o, table, types, &memory) && ok;
    }
    return ok ? 0 : 1;
}
