// test_attention.cpp: decode attention as ggml's CPU backend calls it, with every instruction set of this machine: against
// float64 over the dequantised cache, and never further from it than ggml's own.
#include "attention.h"
#include "attention_case.h"
#include "model.h"
#include "tables.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

static pinfer_model any_model; // in use while it is held

static std::vector<double> dequantised(const ggml_tensor * t) {
    std::vector<float> f((size_t) ggml_nelements(t));
    ggml_get_type_traits(t->type)->to_float(t->data, f.data(), ggml_nelements(t));
    return {f.begin(), f.end()};
}

static std::vector<double> reference(const attention_case & c) {
    const attention_shape &   s = c.s;
    const std::vector<double> k = dequantised(c.k), v = dequantised(c.v);
    const float *             q = (const float *) c.q->data;
    std::vector<double>       out(c.n_out()), weights((size_t) s.n_positions);
    for (int64_t i = 0; i < s.n_streams * s.n_tokens * s.n_heads; i++) { // [stream][token][head]
        const int64_t stream = i / (s.n_tokens * s.n_heads), token = i / s.n_heads % s.n_tokens;
        const int64_t kv     = i % s.n_heads / (s.n_heads / s.n_kv_heads);
        const auto    at     = [&](int64_t p) { return (stream * s.n_positions + p) * s.n_kv_heads + kv; };
        const auto *  mask   = c.mask ? (const ggml_fp16_t *) c.mask->data +
                                            ((s.one_mask ? 0 : stream) * s.n_tokens + token) * s.n_positions
                                      : nullptr;
        double        top = -INFINITY, sum = 0.0;
        for (int64_t p = 0; p < s.n_positions; p++) {
            double score = 0.0;
            for (int64_t j = 0; j < s.k_size; j++) {
                score += (double) q[i * s.k_size + j] * k[(size_t) (at(p) * s.k_size + j)];
            }
            weights[(size_t) p] = mask && mask[p] ? -INFINITY : score / sqrt((double) s.k_size);
            top                 = std::max(top, weights[(size_t) p]);
        }
        for (double & w : weights) {
            w = w == -INFINITY ? 0.0 : exp(w - top);
            sum += w;
        }
        for (int64_t p = 0; p < s.n_positions; p++) {
            for (int64_t j = 0; j < s.v_size && weights[(size_t) p] != 0.0; j++) {
                out[(size_t) (i * s.v_size + j)] += weights[(size_t) p] / sum * v[(size_t) (at(p) * s.v_size + j)];
            }
        }
    }
    return out;
}

// Mean squared error over the mean square.
static double nmse(const std::vector<float> & got, const std::vector<double> & expected) {
    double error = 0.0, square = 0.0;
    for (size_t i = 0; i < got.size(); i++) {
        error += (got[i] - expected[i]) * (got[i] - expected[i]);
        square += expected[i] * expected[i];
    }
    return square > 0.0 ? error / square : error > 0.0 ? INFINITY : error == 0.0 ? 0.0 : NAN;
}

static std::vector<float> ours(attention_runner * runner, const attention_case & c, int n_threads) {
    pinfer_model_hold(&any_model);
    auto out = runner->compute(c, n_threads);
    pinfer_model_let_go(&any_model);
    return out;
}

static bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

static std::string name_of(const attention_shape & s, int n_threads) {
    char text[160];
    snprintf(text, sizeof(text), "%s/%s %lld/%lld, %lld heads of %lld, %lld queries, %lld positions, %lld streams, %d threads",
             ggml_type_name(s.k_type), ggml_type_name(s.v_type), (long long) s.k_size, (long long) s.v_size, (long long) s.n_heads,
             (long long) s.n_kv_heads, (long long) s.n_tokens, (long long) s.n_positions, (long long) s.n_streams, n_threads);
    return text;
}

static void check_case(report * r, attention_runner * runner, const attention_case & c, int n_threads) {
    const auto expected = reference(c);
    const auto got      = ours(runner, c, n_threads);
    const bool took     = pinfer_attention_took(c.op);
    const bool repeated = same_bits(got, ours(runner, c, n_threads));
    const auto stock    = runner->compute(c, n_threads);
    const bool gone     = !pinfer_attention_took(c.op);
    const double own = nmse(got, expected), theirs = nmse(stock, expected);
    // sums of F32 numbers; ggml also rounds q, and its sums for F16, to F16
    const bool   ok = took && gone && repeated && own < 1e-11 && own <= std::max(theirs, 1e-12);
    char         text[320];
    snprintf(text, sizeof(text), "%s: error %.1e, ggml's %.1e%s%s%s", name_of(c.s, n_threads).c_str(), own, theirs,
             took ? "" : ", not taken", gone ? "" : ", kept", repeated ? "" : ", not the same bits again");
    r->check(text, ok);
}

// ---- what is seen ----------------------------------------------------------------------------------------------------

// A prompt that is continued: each query sees what lies before it.
static attention_sight causal(const attention_shape & s) {
    return [s](int64_t, int64_t token, int64_t position) { return position <= s.n_positions - s.n_tokens + token; };
}

// Sequences that share a cache: each query has its own random stretches, one query sees nothing.
static attention_sight patches(const attention_shape & s, uint64_t seed) {
    return [s, seed](int64_t stream, int64_t token, int64_t position) {
        random_source own = {seed + (uint64_t) ((stream * 100 + token) * 1000 + position / 37)};
        own.next();
        return (s.n_tokens < 3 || token != 1) && own.next() % 4 == 0;
    };
}

static attention_sight random_sight(const attention_shape & s, random_source * r) {
    switch (r->next() % 4) {
        case 0:  return nullptr; // no mask
        case 1:  return patches(s, r->next());
        default: return causal(s);
    }
}

template <typename T> static T one_of(random_source * r, std::initializer_list<T> of) {
    return of.begin()[r->next() % of.size()];
}

static void check_random(report * r, attention_runner * runner, int n) {
    random_source random = {7};
    for (int i = 0; i < n; i++) {
        attention_shape s;
        s.k_type      = one_of(&random, {GGML_TYPE_F16, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0});
        s.v_type      = random.next() % 3 ? s.k_type : one_of(&random, {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0});
        s.k_size      = s.k_type == GGML_TYPE_F16 ? one_of<int64_t>(&random, {16, 48, 64, 80, 96, 112, 128, 256})
                                                  : one_of<int64_t>(&random, {32, 64, 96, 128, 256});
        s.v_size      = s.v_type == GGML_TYPE_F16 ? s.k_size : (s.k_size + 31) / 32 * 32;
        s.n_kv_heads  = one_of<int64_t>(&random, {1, 2, 3, 4});
        s.n_heads     = s.n_kv_heads * one_of<int64_t>(&random, {1, 1, 2, 3, 4, 5, 8});
        s.n_tokens    = one_of<int64_t>(&random, {1, 1, 1, 2, 3, 4, 7, 16});
        s.n_streams   = one_of<int64_t>(&random, {1, 1, 1, 2, 3});
        s.n_positions = s.n_tokens + random.next() % one_of<uint32_t>(&random, {16, 100, 600, 3000});
        while (s.n_heads * s.n_tokens * s.n_streams * s.n_positions * s.k_size > 12'000'000) { // for the reference's sake
            s.n_positions = s.n_tokens + (s.n_positions - s.n_tokens) / 2;
        }
        s.one_mask = random.next() % 4 == 0;
        const attention_case c(s, &random, random_sight(s, &random));
        check_case(r, runner, c, 1 + (int) (random.next() % 5));
    }
}

// Many heads a KV head, long caches, and a head size of MLA.
static void check_chosen(report * r, attention_runner * runner) {
    random_source         random = {8};
    const attention_shape shapes[] = {
        {.n_heads = 71, .n_kv_heads = 1, .n_tokens = 2, .n_positions = 300},
        {.n_heads = 32, .n_kv_heads = 8, .n_positions = 3000},
        {.n_heads = 16, .n_kv_heads = 16, .n_positions = 2048},
        {.k_size = 192, .v_size = 128, .n_heads = 4, .n_kv_heads = 4, .n_positions = 512},
        {.k_size = 576, .v_size = 512, .n_heads = 16, .n_kv_heads = 1, .n_positions = 400},
        {.n_heads = 2, .n_kv_heads = 2, .n_positions = 1},
    };
    for (const attention_shape & s : shapes) {
        const attention_case c(s, &random, causal(s));
        for (int n_threads : {1, 2, 5, 16}) {
            check_case(r, runner, c, n_threads);
        }
    }
}

// What a query does not see must not reach it, whatever it is.
static void check_garbage(report * r, attention_runner * runner) {
    for (int64_t n_tokens : {1, 2, 6}) {
        random_source  random = {9};
        attention_shape s      = {.n_heads = 8, .n_kv_heads = 4, .n_tokens = n_tokens, .n_positions = 200};
        attention_case c(s, &random, patches(s, 3));
        const auto     clean    = ours(runner, c, 2);
        const auto     expected = reference(c);
        for (int64_t p = 0; p < s.n_positions; p++) {
            bool seen = false; // query 0 alone keeps its own
            seen      = ((const ggml_fp16_t *) c.mask->data)[p] == 0;
            for (int64_t i = 0; !seen && i < s.n_kv_heads * s.k_size; i++) {
                ((ggml_fp16_t *) c.k->data)[p * s.n_kv_heads * s.k_size + i] = 0x7e00;                    // NaN
                ((ggml_fp16_t *) c.v->data)[p * s.n_kv_heads * s.v_size + i] = i % 2 ? 0x7c00 : 0x7e00; // inf, NaN
            }
        }
        auto         got = ours(runner, c, 2);
        const size_t row = (size_t) (s.n_heads * s.v_size);
        got.resize(row);
        char text[80];
        snprintf(text, sizeof(text), "NaN where query 0 of %lld does not look", (long long) n_tokens);
        r->check(text, nmse(got, {expected.begin(), expected.begin() + (long) row}) < 1e-11 && clean.size() >= row);
        if (n_tokens > 2) { // and it does reach who sees it
            const auto all = ours(runner, c, 2);
            r->check("NaN where query 2 looks", std::any_of(all.begin() + 2 * (long) row, all.begin() + 3 * (long) row,
                                                            [](float f) { return f != f; }));
        }
    }
}

// Left to ggml, bit for bit.
static void check_unknown(report * r, attention_runner * runner) {
    random_source random = {10};
    attention_shape s[] = {
        {.n_tokens = 17},           {.max_bias = 8.0f},         {.softcap = 30.0f}, {.sinks = true},
        {.k_size = 72, .v_size = 72}, {.k_type = GGML_TYPE_BF16, .v_type = GGML_TYPE_BF16}, {.v_type = GGML_TYPE_Q5_0},
        {.k_type = GGML_TYPE_F32, .v_type = GGML_TYPE_F32},
    };
    const char * names[] = {"17 queries", "ALiBi", "softcap", "sinks", "head size 72", "BF16", "V in Q5_0", "F32"};
    for (size_t i = 0; i < std::size(names); i++) {
        const attention_case c(s[i], &random, causal(s[i]));
        const auto           with = ours(runner, c, 2);
        const bool           left = !pinfer_attention_took(c.op) && !pinfer_attention_knows(c.op);
        r->check(std::string("left to ggml: ") + names[i], left && same_bits(with, runner->compute(c, 2)));
    }
}

static int check_all(const char * isa) {
    report r;
    r.check(std::string("kernels: ") + pinfer_kernel_isa(), strcmp(isa, pinfer_kernel_isa()) == 0);
    pinfer_attention_install();
    pinfer_attention_install(); // the second time changes nothing
    attention_runner runner;
    check_random(&r, &runner, strcmp(isa, "scalar") == 0 ? 60 : 250);
    check_chosen(&r, &runner);
    check_garbage(&r, &runner);
    check_unknown(&r, &runner);
    return r.finish();
}

// Kernels are chosen once for a process: each instruction set gets its own.
static bool passes(const char * program, const char * isa) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        setenv("PINFER_ISA", isa, 1);
        setenv("PINFER_ATTENTION", "always", 1); // also caches so short that they are left to ggml
        execl(program, program, isa, (char *) nullptr);
        _exit(127);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(int argc, char ** argv) {
    if (argc > 1) {
        return check_all(argv[1]);
    }
    size_t       n;
    const auto * tables = pinfer_kernel_tables(&n);
    int          failed = 0, tested = 0;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(tables[i]->isa, "neon") == 0) {
            continue; // attention has no code for it
        }
        tested++;
        if (!passes("/proc/self/exe", tables[i]->isa)) {
            printf("FAIL %s\n", tables[i]->isa);
            failed++;
        }
    }
    printf("%d instruction sets, %d failed\n", tested, failed);
    return failed || !tested;
}
