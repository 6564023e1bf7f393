// test_kernel_tables.cpp: every kernel table this machine can run against the scalar one, on rows of random bytes,
// which reach the corners that a quantiser never writes (-128, full scales, any nibble). Links nothing of ggml, so it
// also runs in an emulator of another architecture:
//
//   I="-I native/kernels -I <folder of ggml.h>"
//   K="native/kernels/scalar.cpp native/kernels/neon.cpp native/kernels/isa.cpp"
//   aarch64-linux-gnu-g++ -std=c++20 -O2 -Wall -Wextra -static $I native/tests/test_kernel_tables.cpp $K -o test_neon
//   qemu-aarch64-static ./test_neon
//
// and once more with -march=armv8.2-a+dotprod.
#include "blocks.h"
#include "kernel_check.h"
#include "tables.h"

static const int64_t LENGTHS[] = { 32, 96, 256, 768, 2048, 4096 };

struct type_shape {
    enum ggml_type type;
    const char *   name;
    int64_t        block;
    size_t         bytes;
    size_t         f16_at[2]; // where the F16 scales of a block are
    int            n_f16;
};

static const type_shape SHAPES[] = {
    { GGML_TYPE_F32, "f32", 1, 4, {}, 0 },
    { GGML_TYPE_F16, "f16", 1, 2, { 0 }, 1 },
    { GGML_TYPE_BF16, "bf16", 1, 2, {}, 0 },
    { GGML_TYPE_Q8_0, "q8_0", 32, sizeof(block_q8_0), { 0 }, 1 },
    { GGML_TYPE_Q4_0, "q4_0", 32, sizeof(block_q4_0), { 0 }, 1 },
    { GGML_TYPE_Q4_1, "q4_1", 32, sizeof(block_q4_1), { 0, 2 }, 2 },
    { GGML_TYPE_Q5_0, "q5_0", 32, sizeof(block_q5_0), { 0 }, 1 },
    { GGML_TYPE_Q5_1, "q5_1", 32, sizeof(block_q5_1), { 0, 2 }, 2 },
    { GGML_TYPE_Q4_K, "q4_K", 256, sizeof(block_q4_k), { 0, 2 }, 2 },
    { GGML_TYPE_Q5_K, "q5_K", 256, sizeof(block_q5_k), { 0, 2 }, 2 },
    { GGML_TYPE_Q6_K, "q6_K", 256, sizeof(block_q6_k), { 208 }, 1 },
};

// F16 of either sign between 2^-7 and 2^2, now and then zero or subnormal.
static uint16_t random_f16(random_source * r) {
    const uint32_t kind     = r->next() % 16;
    const uint32_t exponent = kind < 2 ? 0 : 8 + r->next() % 9;
    const uint32_t mantissa = kind == 0 ? 0 : r->next() & 0x3ff;
    return (uint16_t) ((r->next() & 1) << 15 | exponent << 10 | mantissa);
}

static std::vector<uint8_t> random_row(const type_shape & t, int64_t n, random_source * r) {
    std::vector<uint8_t> row((size_t) (n / t.block) * t.bytes);
    if (t.type == GGML_TYPE_F32 || t.type == GGML_TYPE_BF16) {
        for (int64_t i = 0; i < n; i++) {
            const float f = r->normal();
            memcpy(&row[(size_t) i * t.bytes], (const char *) &f + 4 - t.bytes, t.bytes); // a BF16 is the upper half
        }
        return row;
    }
    for (uint8_t & byte : row) {
        byte = (uint8_t) r->next();
    }
    for (int64_t b = 0; b < n / t.block; b++) {
        for (int i = 0; i < t.n_f16; i++) {
            const uint16_t h = random_f16(r);
            memcpy(&row[(size_t) b * t.bytes + t.f16_at[i]], &h, 2);
        }
    }
    return row;
}

static int8_t random_x(random_source * r) {
    return (int8_t) ((int) (r->next() % 255) - 127);
}

// x in the form a kernel takes, and as numbers.
static std::vector<uint8_t> prepared_x(enum ggml_type x_type, int64_t n, random_source * r,
                                       std::vector<double> * values) {
    values->resize((size_t) n);
    std::vector<uint8_t> x;
    if (x_type == GGML_TYPE_F32) {
        x.resize((size_t) n * sizeof(float));
        for (int64_t i = 0; i < n; i++) {
            ((float *) x.data())[i] = r->normal();
            (*values)[(size_t) i]   = ((float *) x.data())[i];
        }
    } else if (x_type == GGML_TYPE_Q8_0) {
        x.resize((size_t) n / 32 * sizeof(block_q8_0));
        for (int64_t b = 0; b < n / 32; b++) {
            block_q8_0 *   block = (block_q8_0 *) x.data() + b;
            const uint16_t d     = random_f16(r);
            memcpy(block->d, &d, 2);
            for (int j = 0; j < 32; j++) {
                block->q[j]                    = random_x(r);
                (*values)[(size_t) b * 32 + j] = (double) load_f16(block->d) * block->q[j];
            }
        }
    } else {
        x.resize((size_t) n / 256 * sizeof(block_q8_k));
        for (int64_t b = 0; b < n / 256; b++) {
            block_q8_k * block = (block_q8_k *) x.data() + b;
            memset(block, 0, sizeof(*block));
            block->d = r->normal();
            for (int j = 0; j < 256; j++) {
                block->q[j] = random_x(r);
                block->sums[j / 16] += block->q[j];
                (*values)[(size_t) b * 256 + j] = (double) block->d * block->q[j];
            }
        }
    }
    return x;
}

static void test_type(const struct pinfer_kernel_table * table, const type_shape & t, int64_t n, report * rep) {
    const struct pinfer_kernel * reference = pinfer_kernel_table_find(&pinfer_kernels_scalar, t.type);
    const struct pinfer_kernel * kernel    = pinfer_kernel_table_find(table, t.type);
    const std::string            name      = std::string(table->isa) + " " + t.name + " n=" + std::to_string(n);
    if (reference == nullptr || kernel == nullptr || reference->x_type != kernel->x_type) {
        rep->check(name + " is in both tables", false);
        return;
    }
    random_source              r = { (uint64_t) n * 1000 + t.type };
    const std::vector<uint8_t> aligned = random_row(t, n, &r);
    std::vector<uint8_t>       shifted(aligned.size() + 1);
    memcpy(&shifted[1], aligned.data(), aligned.size());
    const void * row = &shifted[1];

    std::vector<double>        x_values;
    const std::vector<uint8_t> x = prepared_x(kernel->x_type, n, &r, &x_values);
    std::vector<float>         w((size_t) n), scratch((size_t) n);
    reference->axpy(n, 1.0f, row, w.data(), scratch.data());
    const std::vector<double> weights(w.begin(), w.end());

    // Offsets are as large as the weights here and cancel some of them.
    worst_element dot;
    dot.see(0, kernel->dot(n, row, x.data()), reference->dot(n, row, x.data()),
            2.0 * dot_tolerance(n, t.block == 1 ? n : n / 16, 16.0, norm(weights), norm(x_values)));
    rep->line(name + " dot", dot);

    const float              a    = r.normal();
    const std::vector<float> y    = r.normals(n);
    std::vector<float>       got  = y, expected = y;
    kernel->axpy(n, a, row, got.data(), scratch.data());
    reference->axpy(n, a, row, expected.data(), scratch.data());
    // About the largest scale * q or offset, before they cancel.
    const double  largest = norm(weights) * 4.0 / sqrt((double) n);
    worst_element axpy;
    for (int64_t i = 0; i < n; i++) {
        const double wi = t.block == 1 ? fabs(weights[(size_t) i]) : fabs(weights[(size_t) i]) + largest;
        axpy.see(i, got[(size_t) i], expected[(size_t) i], 4.0 * EPS_F32 * (fabs(y[(size_t) i]) + fabs(a) * wi));
    }
    rep->line(name + " axpy", axpy);
}

int main() {
    report                                    rep;
    size_t                                    n_tables;
    const struct pinfer_kernel_table * const * tables = pinfer_kernel_tables(&n_tables);
    rep.check("the last table is scalar", tables[n_tables - 1] == &pinfer_kernels_scalar);
    for (size_t i = 0; i + 1 < n_tables; i++) {
        for (const type_shape & t : SHAPES) {
            for (const int64_t n : LENGTHS) {
                if (n % t.block == 0) {
                    test_type(tables[i], t, n, &rep);
                }
            }
            if (t.block == 1) { // not a multiple of any vector
                test_type(tables[i], t, 77, &rep);
            }
        }
    }
    return rep.finish();
}
