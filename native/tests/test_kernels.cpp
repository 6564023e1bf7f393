// test_kernels.cpp: every type that llama.cpp multiplies, with every instruction set of this machine: dot and axpy
// against float64 over the dequantised row and the dequantised x, and against ggml's own vec_dot. Rows come from
// ggml's quantiser. Called with --forced ISA it checks, inside a process started with PINFER_ISA=ISA, that these are
// the kernels in use.
#include "blocks.h"
#include "ggml-cpu.h"
#include "kernel_check.h"
#include "tables.h"

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <set>

static const enum ggml_type TYPES[] = {
    GGML_TYPE_F32,     GGML_TYPE_F16,    GGML_TYPE_BF16,   GGML_TYPE_Q4_0,    GGML_TYPE_Q4_1,  GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1,    GGML_TYPE_Q8_0,   GGML_TYPE_Q2_K,   GGML_TYPE_Q3_K,    GGML_TYPE_Q4_K,  GGML_TYPE_Q5_K,
    GGML_TYPE_Q6_K,    GGML_TYPE_IQ1_S,  GGML_TYPE_IQ1_M,  GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_XS, GGML_TYPE_IQ2_S,
    GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S,  GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS,  GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0,
    GGML_TYPE_MXFP4,   GGML_TYPE_NVFP4,  GGML_TYPE_Q1_0,   GGML_TYPE_Q2_0,
};

static const enum ggml_type NOT_MULTIPLIED[] = { GGML_TYPE_I8, GGML_TYPE_I32, GGML_TYPE_F64, GGML_TYPE_Q8_1,
                                                  GGML_TYPE_Q8_K };

// Types for which every table must have kernels of its own.
static const enum ggml_type OWN[] = {
    GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
};

// One row and one x of a type, with everything that the comparisons need.
struct sample {
    enum ggml_type       type;
    int64_t              n;
    std::vector<uint8_t> row;
    std::vector<float>   x;
    std::vector<double>  w;       // the row's values
    std::vector<double>  largest; // largest |w| in the block of each value: the size of scale * q and of the offset
};

// These quantisers spend seconds to build the tables they search, and every byte they could write is valid: their rows
// are random bytes. The F16 scale leads a block, but for IQ1_M, where it is the high nibbles of the last four words.
static bool is_slow_to_quantise(enum ggml_type type) {
    return type == GGML_TYPE_IQ1_S || type == GGML_TYPE_IQ1_M || type == GGML_TYPE_IQ2_XXS ||
           type == GGML_TYPE_IQ2_XS || type == GGML_TYPE_IQ2_S || type == GGML_TYPE_IQ3_XXS || type == GGML_TYPE_IQ3_S;
}

static void random_row(enum ggml_type type, std::vector<uint8_t> * row, random_source * r) {
    for (uint8_t & byte : *row) {
        byte = (uint8_t) r->next();
    }
    const size_t size = ggml_type_size(type);
    for (size_t at = 0; at < row->size(); at += size) {
        const uint32_t scale = 0x2c00 + r->next() % 0x800; // 2^-4 to 2^-2
        for (size_t i = 0; i < 4 && type == GGML_TYPE_IQ1_M; i++) {
            uint8_t * high = &(*row)[at + size - 7 + 2 * i];
            *high          = (uint8_t) ((*high & 15) | ((scale >> (4 * i)) & 15) << 4);
        }
        if (type != GGML_TYPE_IQ1_M) {
            memcpy(&(*row)[at], &scale, 2);
        }
    }
}

static sample make_sample(enum ggml_type type, int64_t n, uint64_t seed) {
    random_source      r      = { seed };
    std::vector<float> values = r.normals(n), importance((size_t) n, 1.0f), back((size_t) n);
    sample             s      = { type, n, std::vector<uint8_t>(ggml_row_size(type, n)), r.normals(n), {}, {} };
    if (is_slow_to_quantise(type)) {
        random_row(type, &s.row, &r);
    } else {
        ggml_quantize_chunk(type, values.data(), s.row.data(), 0, 1, n, importance.data());
    }
    if (type == GGML_TYPE_F32) {
        memcpy(back.data(), s.row.data(), s.row.size());
    } else {
        ggml_get_type_traits(type)->to_float(s.row.data(), back.data(), n);
    }
    s.w.assign(back.begin(), back.end());
    const int64_t block = ggml_blck_size(type);
    for (int64_t i = 0; i < n; i++) {
        double largest = 0.0;
        for (int64_t j = i - i % block; j < i - i % block + block; j++) {
            largest = std::max(largest, fabs(s.w[(size_t) j]));
        }
        s.largest.push_back(largest);
    }
    return s;
}

static std::vector<uint8_t> prepare(enum ggml_type x_type, const std::vector<float> & x) {
    std::vector<uint8_t> out(pinfer_kernel_prepared_size(x_type, (int64_t) x.size()));
    pinfer_kernel_prepare(x_type, x.data(), out.data(), (int64_t) x.size());
    return out;
}

// The values that a prepared x stands for.
static std::vector<double> prepared_values(enum ggml_type x_type, const std::vector<uint8_t> & x, int64_t n) {
    std::vector<double> values;
    for (int64_t i = 0; i < n; i++) {
        if (x_type == GGML_TYPE_F32) {
            values.push_back(((const float *) x.data())[i]);
        } else if (x_type == PINFER_X_Q8) {
            const pinfer_x_q8 v = x_q8_at(x.data(), n);
            values.push_back((double) v.d[i / 32] * v.q[i]);
        } else if (x_type == GGML_TYPE_Q8_0) {
            const block_q8_0 * b = (const block_q8_0 *) x.data() + i / 32;
            values.push_back((double) load_f16(b->d) * b->q[i % 32]);
        } else { // Q8_K: a float scale, 256 signed bytes, sums
            const uint8_t * b = x.data() + (size_t) (i / 256) * ggml_type_size(GGML_TYPE_Q8_K);
            values.push_back((double) load_f32(b) * (int8_t) b[4 + i % 256]);
        }
    }
    return values;
}

// How far ggml's x may be from ours: F16 and BF16 rows have x rounded to their own type there (relative error of one
// rounding below), blocks of 32 have a scale that is rounded to F16, blocks of 256 one scale for all (so every x is
// rounded anew, to a step of 1/127 of the largest), and Q4_1 and Q5_1 take the sum of 32 x rounded to F16. Errors of
// random sign: four deviations.
static double ggml_tolerance(const sample & s, const std::vector<double> & x) {
    const int64_t block = ggml_blck_size(s.type);
    double        each  = 0.0;
    if (s.type == GGML_TYPE_F16 || s.type == GGML_TYPE_BF16) {
        each = s.type == GGML_TYPE_F16 ? 0x1p-11 : 0x1p-8;
    }
    double variance = 0.0, sum = 0.0, part = 0.0, largest = 0.0, squares = 0.0;
    for (int64_t i = 0; i < s.n; i++) {
        const double w = s.w[(size_t) i], v = x[(size_t) i];
        variance += pow(each * w * v, 2);
        sum += v;
        part += w * v;
        squares += w * w;
        largest = std::max(largest, fabs(v));
        if (block == 32 && i % 32 == 31) {
            const bool offset = s.type == GGML_TYPE_Q4_1 || s.type == GGML_TYPE_Q5_1;
            variance += pow(0x1p-11 * part, 2) + (offset ? pow(0x1p-11 * s.largest[(size_t) i] * sum, 2) : 0.0);
        }
        if (block == 256 && i % 256 == 255) {
            variance += squares * pow(largest / 127.0, 2) / 6.0;
        }
        if (block > 1 && i % block == block - 1) {
            sum = part = largest = squares = 0.0;
        }
    }
    return 4.0 * sqrt(variance);
}

static double ggml_dot(const sample & s) {
    const struct ggml_type_traits_cpu * cpu = ggml_get_type_traits_cpu(s.type);
    const std::vector<uint8_t>          x   = prepare(cpu->vec_dot_type, s.x);
    float                               sum = NAN;
    cpu->vec_dot((int) s.n, &sum, 0, s.row.data(), 0, x.data(), 0, 1);
    return sum;
}

// The row from element 1 on, which is at an odd address.
static std::vector<uint8_t> shifted_by_one(const std::vector<uint8_t> & row) {
    std::vector<uint8_t> shifted(1);
    std::copy(row.begin(), row.end(), std::back_inserter(shifted));
    return shifted;
}

// Quantised rows are summed as integers within 16 weights at least.
static int64_t sums_of(enum ggml_type type, int64_t n) {
    return ggml_is_quantized(type) ? n / 16 : n;
}

static void test_dot(const struct pinfer_kernel * k, const sample & s, const std::string & name, report * rep) {
    const std::vector<uint8_t> x        = prepare(k->x_type, s.x);
    const std::vector<double>  xv       = prepared_values(k->x_type, x, s.n);
    double                     expected = 0.0;
    for (int64_t i = 0; i < s.n; i++) {
        expected += s.w[(size_t) i] * xv[(size_t) i];
    }
    const float   got       = pinfer_kernel_dot(k, s.n, s.row.data(), x.data());
    // A block's scale * q and its offset may each be as large as its largest weight.
    const double  size      = ggml_is_quantized(s.type) ? norm(s.largest) : norm(s.w);
    const double  tolerance = dot_tolerance(s.n, sums_of(s.type, s.n), 8.0, size, norm(xv));
    worst_element against_double, against_ggml;
    against_double.see(0, got, expected, tolerance);
    rep->line(name + " dot", against_double);
    against_ggml.see(0, got, ggml_dot(s), 2.0 * tolerance + ggml_tolerance(s, xv));
    rep->line(name + " dot, ggml's", against_ggml);

    const std::vector<uint8_t> shifted = shifted_by_one(s.row);
    if (k->dot != nullptr && k->dot(s.n, &shifted[1], x.data()) != got) {
        rep->check(name + " dot of a row at an odd address", false);
    }
}

static void test_axpy(const struct pinfer_kernel * k, const sample & s, const std::string & name, report * rep) {
    random_source            r = { 7 };
    const float              a = r.normal();
    const std::vector<float> y = r.normals(s.n);
    std::vector<float>       got = y, scratch((size_t) s.n), again = y;
    pinfer_kernel_axpy(k, s.n, a, s.row.data(), got.data(), scratch.data());
    worst_element worst;
    for (int64_t i = 0; i < s.n; i++) {
        const double size = ggml_is_quantized(s.type) ? s.largest[(size_t) i] : fabs(s.w[(size_t) i]);
        worst.see(i, got[(size_t) i], y[(size_t) i] + (double) a * s.w[(size_t) i],
                  EPS_F32 * (2.0 * fabs(y[(size_t) i]) + 8.0 * fabs(a) * size));
    }
    rep->line(name + " axpy", worst);

    const std::vector<uint8_t> shifted = shifted_by_one(s.row);
    if (k->axpy != nullptr) {
        k->axpy(s.n, a, &shifted[1], again.data(), scratch.data());
        if (again != got) {
            rep->check(name + " axpy of a row at an odd address", false);
        }
    }
}

static std::string case_name(const char * isa, enum ggml_type type, int64_t n) {
    return std::string(isa) + " " + ggml_type_name(type) + " n=" + std::to_string(n);
}

static void test_type(enum ggml_type type, int64_t n, report * rep) {
    const sample s = make_sample(type, n, (uint64_t) type * 100000 + (uint64_t) n);
    size_t       n_tables;
    bool         own = false;
    for (size_t i = 0; i < (pinfer_kernel_tables(&n_tables), n_tables); i++) {
        const struct pinfer_kernel_table * table = pinfer_kernel_tables(&n_tables)[i];
        const struct pinfer_kernel *       k     = pinfer_kernel_table_find(table, type);
        if (k != nullptr) {
            own = true;
            test_dot(k, s, case_name(table->isa, type, n), rep);
            test_axpy(k, s, case_name(table->isa, type, n), rep);
        }
    }
    if (!own) {
        const struct pinfer_kernel * k = pinfer_kernel_get(type);
        test_dot(k, s, case_name("ggml", type, n), rep);
        test_axpy(k, s, case_name("ggml", type, n), rep);
    }
}

static bool is_own(enum ggml_type type) {
    return std::find(std::begin(OWN), std::end(OWN), type) != std::end(OWN);
}

static void test_coverage(report * rep) {
    size_t n_tables;
    pinfer_kernel_tables(&n_tables);
    for (const enum ggml_type type : TYPES) {
        const struct pinfer_kernel * k = pinfer_kernel_get(type);
        rep->check(std::string(ggml_type_name(type)) + " can be multiplied",
                   k != nullptr && k->type == type && (k->dot != nullptr) == is_own(type));
        for (size_t i = 0; i < n_tables && is_own(type); i++) {
            if (pinfer_kernel_table_find(pinfer_kernel_tables(&n_tables)[i], type) == nullptr) {
                rep->check(case_name(pinfer_kernel_tables(&n_tables)[i]->isa, type, 0) + " is missing", false);
            }
        }
    }
    for (const enum ggml_type type : NOT_MULTIPLIED) {
        rep->check(std::string(ggml_type_name(type)) + " cannot be multiplied", pinfer_kernel_get(type) == nullptr);
    }
    rep->check("a type out of range has no kernels", pinfer_kernel_get(GGML_TYPE_COUNT) == nullptr &&
                                                         pinfer_kernel_get((enum ggml_type) - 1) == nullptr);
    const size_t sizes[][2] = {
        { sizeof(block_q8_0), ggml_type_size(GGML_TYPE_Q8_0) }, { sizeof(block_q4_0), ggml_type_size(GGML_TYPE_Q4_0) },
        { sizeof(block_q4_1), ggml_type_size(GGML_TYPE_Q4_1) }, { sizeof(block_q5_0), ggml_type_size(GGML_TYPE_Q5_0) },
        { sizeof(block_q5_1), ggml_type_size(GGML_TYPE_Q5_1) }, { sizeof(block_q4_k), ggml_type_size(GGML_TYPE_Q4_K) },
        { sizeof(block_q5_k), ggml_type_size(GGML_TYPE_Q5_K) }, { sizeof(block_q6_k), ggml_type_size(GGML_TYPE_Q6_K) },
    };
    for (const auto & size : sizes) {
        rep->check("a block of " + std::to_string(size[1]) + " bytes has ggml's size", size[0] == size[1]);
    }
}

// Inside a process started with PINFER_ISA: exit code 0 if exactly that table is in use, and is not another one's code.
static int check_forced(const char * isa) {
    size_t                                    n;
    const struct pinfer_kernel_table * const * tables = pinfer_kernel_tables(&n);
    bool                                      ok     = strcmp(pinfer_kernel_isa(), isa) == 0;
    for (const enum ggml_type type : OWN) {
        for (size_t i = 0; i < n; i++) {
            const struct pinfer_kernel * other = pinfer_kernel_table_find(tables[i], type);
            const struct pinfer_kernel * used  = pinfer_kernel_get(type);
            const bool                   same  = used->dot == other->dot && used->axpy == other->axpy;
            const bool                   none  = used->dot != other->dot && used->axpy != other->axpy;
            ok = ok && (strcmp(tables[i]->isa, isa) == 0 ? same : none);
        }
    }
    return ok ? 0 : 1;
}

// Starts this program again with PINFER_ISA=value and tells whether it found `expected` in use.
static bool runs_with(const char * value, const char * expected) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        setenv("PINFER_ISA", value, 1);
        execl("/proc/self/exe", "test_kernels", "--forced", expected, (char *) nullptr);
        _exit(127);
    }
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void test_forcing(report * rep) {
    size_t                                    n;
    const struct pinfer_kernel_table * const * tables = pinfer_kernel_tables(&n);
    for (size_t i = 0; i < n; i++) {
        const char * isa = tables[i]->isa;
        rep->check(std::string("PINFER_ISA=") + isa + " is obeyed", runs_with(isa, isa));
    }
    rep->check("PINFER_ISA= means the best", runs_with("", tables[0]->isa));
    rep->check("an unknown PINFER_ISA is ignored", runs_with("mmx", tables[0]->isa));
    rep->check("the check can fail", n == 1 || !runs_with(tables[0]->isa, tables[n - 1]->isa));
#if defined(__x86_64__)
    rep->check("an x86 machine with AVX2 has more than scalar kernels", n > 1 || !ggml_cpu_has_avx2());
#endif
}

int main(int argc, char ** argv) {
    if (argc == 3 && strcmp(argv[1], "--forced") == 0) {
        return check_forced(argv[2]);
    }
    report rep;
    test_forcing(&rep);
    test_coverage(&rep);
    for (const enum ggml_type type : TYPES) {
        const int64_t block = ggml_blck_size(type);
        for (const int64_t n : std::set<int64_t>{ block, 3 * block, 256, 2048, 4096 }) {
            if (n % block == 0) {
                test_type(type, n, &rep);
            }
        }
    }
    return rep.finish();
}
