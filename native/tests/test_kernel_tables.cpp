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

static void set_f16_scales(const type_shape & t, std::vector<uint8_t> * row, random_source * r) {
    for (size_t block = 0; block < row->size(); block += t.bytes) {
        for (int i = 0; i < t.n_f16; i++) {
            const uint16_t h = random_f16(r);
            memcpy(&(*row)[block + t.f16_at[i]], &h, 2);
        }
    }
}

// Every weight as large as its type allows, of either sign.
static std::vector<uint8_t> extreme_row(const type_shape & t, int64_t n, random_source * r) {
    const uint8_t        bytes[] = { (uint8_t) (t.type == GGML_TYPE_Q8_0 ? 0x81 : 0xff), 0x80, 0x7f }; // Q8_0 is signed
    std::vector<uint8_t> row((size_t) (n / t.block) * t.bytes, bytes[r->next() % 3]);
    set_f16_scales(t, &row, r);
    return row;
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
    set_f16_scales(t, &row, r);
    return row;
}

static int8_t random_x(random_source * r) {
    return (int8_t) ((int) (r->next() % 255) - 127);
}

// x in the form a kernel takes, and as numbers; all quantised values +127 or -127 if `extreme`.
static std::vector<uint8_t> prepared_x(enum ggml_type x_type, int64_t n, bool extreme, random_source * r,
                                       std::vector<double> * values) {
    values->resize((size_t) n);
    std::vector<uint8_t> x;
    if (x_type == GGML_TYPE_F32) {
        x.resize((size_t) n * sizeof(float));
        for (int64_t i = 0; i < n; i++) {
            ((float *) x.data())[i] = r->normal();
            (*values)[(size_t) i]   = ((float *) x.data())[i];
        }
    } else {
        x.resize(x_q8_size(n));
        const pinfer_x_q8 v    = x_q8_at(x.data(), n);
        const int8_t      most = r->next() % 2 ? 127 : -127;
        for (int64_t b = 0; b < n / 32; b++) {
            int sum[2] = { 0, 0 };
            v.d[b]     = r->normal();
            for (int64_t j = 32 * b; j < 32 * b + 32; j++) {
                v.q[j]                = extreme ? most : random_x(r);
                (*values)[(size_t) j] = (double) v.d[b] * v.q[j];
                sum[j % 32 / 16] += v.q[j];
            }
            v.s16[2 * b]     = v.d[b] * (float) sum[0];
            v.s16[2 * b + 1] = v.d[b] * (float) sum[1];
            v.s32[b]         = v.d[b] * (float) (sum[0] + sum[1]);
        }
        x_q8_fill_lanes(&v, n);
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
    const std::vector<uint8_t> x = prepared_x(kernel->x_type, n, false, &r, &x_values);
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

// Rows and tokens for what works on several of them: PINFER_TILE_ROWS rows, and n_tokens x in one buffer.
struct batch {
    const struct pinfer_kernel *      reference;
    const struct pinfer_kernel *      kernel;
    int64_t                           n, n_tokens;
    std::string                       name;
    int64_t                           block; // 1: float rows
    std::vector<std::vector<uint8_t>> rows;
    std::vector<const void *>         row;
    std::vector<uint8_t>              x;
    size_t                            x_row;
    std::vector<double>               x_norm, row_norm;

    const void * token(int64_t t) const { return x.data() + (size_t) t * x_row; }

    double tolerance(size_t r, int64_t t) const {
        return 2.0 * dot_tolerance(n, block == 1 ? n : n / 16, 16.0, row_norm[r], x_norm[(size_t) t]);
    }
};

static batch make_batch(const struct pinfer_kernel_table * table, const type_shape & t, int64_t n, int64_t n_tokens,
                        bool extreme) {
    batch b     = {};
    b.reference = pinfer_kernel_table_find(&pinfer_kernels_scalar, t.type);
    b.kernel    = pinfer_kernel_table_find(table, t.type);
    b.n         = n;
    b.n_tokens  = n_tokens;
    b.block     = t.block;
    b.name      = std::string(table->isa) + " " + t.name + " n=" + std::to_string(n) +
             " tokens=" + std::to_string(n_tokens) + (extreme ? " extreme" : "");
    random_source r = { (uint64_t) n * 1000 + t.type + (uint64_t) n_tokens };
    for (int i = 0; i < PINFER_TILE_ROWS; i++) {
        std::vector<float> w((size_t) n), scratch((size_t) n);
        b.rows.push_back(extreme ? extreme_row(t, n, &r) : random_row(t, n, &r));
        b.reference->axpy(n, 1.0f, b.rows.back().data(), w.data(), scratch.data());
        b.row_norm.push_back(norm(std::vector<double>(w.begin(), w.end())));
    }
    for (const auto & row : b.rows) {
        b.row.push_back(row.data());
    }
    for (int64_t i = 0; i < n_tokens; i++) {
        std::vector<double>        values;
        const std::vector<uint8_t> one = prepared_x(b.kernel->x_type, n, extreme, &r, &values);
        b.x.insert(b.x.end(), one.begin(), one.end());
        b.x_norm.push_back(norm(values));
        b.x_row = one.size();
    }
    return b;
}

static void test_dot_many(const batch & b, report * rep) {
    worst_element      worst;
    std::vector<float> out((size_t) b.n_tokens);
    b.kernel->dot_many(b.n, b.row[0], b.x.data(), b.x_row, b.n_tokens, out.data());
    for (int64_t t = 0; t < b.n_tokens; t++) {
        worst.see(t, out[(size_t) t], b.reference->dot(b.n, b.row[0], b.token(t)), b.tolerance(0, t));
    }
    rep->line(b.name + " dot_many", worst);
}

// In two pieces where the type's blocks allow, on top of what is in the output.
static void test_tile(const batch & b, pinfer_pack_fn pack, pinfer_multiply_fn multiply, const char * what,
                      report * rep) {
    const int64_t      cut = b.n / 2 / b.block * b.block, out_row = PINFER_TILE_ROWS + 3;
    random_source      r   = { 11 };
    const auto         before = r.normals(b.n_tokens * out_row);
    std::vector<float> out    = before;
    void *             tile   = aligned_alloc(64, (size_t) b.n / 32 * sizeof(tile_group));
    for (int64_t begin = 0, end = cut > 0 ? cut : b.n; begin < b.n; begin = end, end = b.n) {
        pack(begin, end, b.row.data(), tile);
        multiply(b.n, begin, end, tile, b.x.data(), b.x_row, b.n_tokens, out.data(), out_row);
    }
    free(tile);
    worst_element worst;
    bool          beside = true;
    for (int64_t t = 0; t < b.n_tokens; t++) {
        for (int64_t i = 0; i < out_row; i++) {
            const auto at = (size_t) (t * out_row + i);
            if (i < PINFER_TILE_ROWS) {
                const float expected = before[at] + b.reference->dot(b.n, b.row[(size_t) i], b.token(t));
                // what the centre of the unsigned weights adds is taken off again in floats
                worst.see((int64_t) at, out[at], expected,
                          4.0 * b.tolerance((size_t) i, t) + EPS_F32 * fabs(before[at]));
            } else {
                beside = beside && out[at] == before[at];
            }
        }
    }
    rep->line(b.name + what, worst);
    rep->check(b.name + what + " writes its rows alone", beside);
}

static void test_tiles(const batch & b, report * rep) {
    if (b.kernel->pack) {
        test_tile(b, b.kernel->pack, b.kernel->multiply, " tile", rep);
    }
    if (b.kernel->pack_small) {
        test_tile(b, b.kernel->pack_small, b.kernel->multiply_small, " small tile", rep);
    }
}

static void test_accumulate(const batch & b, report * rep) {
    random_source      r = { 13 };
    const int64_t      n_rows = PINFER_TILE_ROWS - 3;
    std::vector<float> a = r.normals(n_rows * b.n_tokens), got = r.normals(b.n * b.n_tokens), scratch((size_t) b.n);
    a[1]                        = 0.0f;
    std::vector<float> expected = got;
    b.kernel->accumulate(b.n, n_rows, b.row.data(), a.data(), b.n_tokens, got.data());
    double largest = 0.0;
    for (int64_t i = 0; i < n_rows; i++) {
        for (int64_t t = 0; t < b.n_tokens; t++) {
            const float f = a[(size_t) (i * b.n_tokens + t)];
            b.reference->axpy(b.n, f, b.row[(size_t) i], &expected[(size_t) (t * b.n)], scratch.data());
            largest = std::max(largest, fabs(f) * b.row_norm[(size_t) i]);
        }
    }
    worst_element worst;
    for (int64_t i = 0; i < b.n * b.n_tokens; i++) {
        worst.see(i, got[(size_t) i], expected[(size_t) i], EPS_F32 * (double) n_rows * (largest + 4.0));
    }
    rep->line(b.name + " accumulate", worst);
}

static void test_batches(const struct pinfer_kernel_table * table, const type_shape & t, int64_t n, report * rep) {
    for (const int64_t n_tokens : { 1, 2, 3, 4, 7, 8, 21 }) {
        const batch b = make_batch(table, t, n, n_tokens, false);
        if (b.kernel->dot_many) {
            test_dot_many(b, rep);
        }
        test_tiles(b, rep);
        if (b.kernel->accumulate) {
            test_accumulate(b, rep);
        }
    }
}

// Sums in 16 bits must not overflow.
static void test_extremes(const struct pinfer_kernel_table * table, const type_shape & t, int64_t n, report * rep) {
    const batch   b = make_batch(table, t, n, 4, true);
    worst_element worst;
    for (size_t r = 0; r < b.rows.size(); r++) {
        for (int64_t i = 0; i < b.n_tokens; i++) {
            worst.see((int64_t) r, b.kernel->dot(n, b.row[r], b.token(i)), b.reference->dot(n, b.row[r], b.token(i)),
                      b.tolerance(r, i));
        }
    }
    rep->line(b.name + " dot", worst);
    test_tiles(b, rep);
}

// What every table but the scalar one has besides dot and axpy: rows for many tokens at once, in one way or another.
// NEON has no tiles.
static void test_presence(const struct pinfer_kernel_table * table, const type_shape & t, report * rep) {
    const struct pinfer_kernel * k        = pinfer_kernel_table_find(table, t.type);
    const bool                   is_float = t.block == 1, sums_rows = is_float || t.type == GGML_TYPE_Q8_0;
    const bool                   has_tiles = !is_float && strcmp(table->isa, "neon") != 0;
    const std::string            name      = std::string(table->isa) + " " + t.name;
    rep->check(name + " dot_many where it must be", !is_float || (k != nullptr && k->dot_many != nullptr));
    rep->check(name + " accumulate where it must be", !sums_rows || (k != nullptr && k->accumulate != nullptr));
    rep->check(name + " tiles where they must be",
               !has_tiles || (k != nullptr && k->pack != nullptr && k->multiply != nullptr));
    rep->check(name + " small tiles where they must be",
               !has_tiles || (t.type != GGML_TYPE_Q4_0 && t.type != GGML_TYPE_Q8_0) ||
                   (k != nullptr && k->pack_small != nullptr && k->multiply_small != nullptr));
}

// Tiles of 1 and 2 bits against the numbers themselves.
static void test_bits(const struct pinfer_kernel_table * table, int bits, int64_t n, int64_t n_tokens, report * rep) {
    random_source                     r = { (uint64_t) (n * 10 + n_tokens) };
    std::vector<std::vector<uint8_t>> rows(PINFER_TILE_ROWS, std::vector<uint8_t>((size_t) (n * bits / 8)));
    std::vector<uint8_t>              x;
    std::vector<std::vector<double>>  values((size_t) n_tokens);
    struct alignas(64) group { tile_group_bits<2> g; }; // room for either
    std::vector<group> tile((size_t) n / 32);
    std::vector<float>                out((size_t) (n_tokens * PINFER_TILE_ROWS), 1.0f);
    const auto                        number = [&](size_t row, int64_t j) {
        const int shift = (int) (j * bits % 8), mask = (1 << bits) - 1;
        return 2 * (rows[row][(size_t) (j * bits / 8)] >> shift & mask) - mask;
    };
    memset((void *) tile.data(), 0, tile.size() * sizeof(tile[0]));
    for (size_t i = 0; i < rows.size(); i++) {
        for (uint8_t & byte : rows[i]) {
            byte = (uint8_t) r.next();
        }
        for (int64_t j = 0; j < n; j++) { // the layout of blocks.h, said once more
            const int64_t c = j % 32 / 4;
            uint8_t *     q = (uint8_t *) tile.data() + ((j / 32 * bits + c % bits) * PINFER_TILE_ROWS + (int64_t) i) * 4;
            q[j % 4] |= (uint8_t) ((number(i, j) + (1 << bits) - 1) / 2 << (c / bits * bits));
        }
    }
    size_t x_row = 0;
    for (auto & v : values) {
        const std::vector<uint8_t> one = prepared_x(PINFER_X_Q8, n, false, &r, &v);
        x.insert(x.end(), one.begin(), one.end());
        x_row = one.size();
    }
    table->multiply_bits[bits - 1](n, 0, n, tile.data(), x.data(), x_row, n_tokens, out.data(), PINFER_TILE_ROWS);
    worst_element worst;
    for (size_t t = 0; t < values.size(); t++) {
        for (size_t i = 0; i < rows.size(); i++) {
            double expected = 1.0;
            for (int64_t j = 0; j < n; j++) {
                expected += number(i, j) * values[t][(size_t) j];
            }
            const size_t at = t * PINFER_TILE_ROWS + i;
            worst.see((int64_t) at, out[at], expected, EPS_F32 * 8.0 * (double) n * norm(values[t]));
        }
    }
    rep->line(std::string(table->isa) + " " + std::to_string(bits) + " bits n=" + std::to_string(n) +
                  " tokens=" + std::to_string(n_tokens), worst);
}

// Sparse sums of rows: most factors are 0, some -0.
static void test_add_rows(const struct pinfer_kernel_table * table, int64_t n, int64_t n_rows, int64_t n_tokens, report * rep) {
    random_source      r{(uint64_t) (n + 1000 * n_rows + n_tokens)};
    const int64_t      y_row = n + 5;
    std::vector<float> w = r.normals(PINFER_SUM_ROWS * n), y((size_t) (n_tokens * y_row), 0.5f);
    std::vector<std::vector<float>> a((size_t) n_tokens, std::vector<float>((size_t) n_rows)), packed((size_t) n_tokens);
    std::vector<const float *>      factors;
    std::vector<uint64_t>           rows((size_t) n_tokens), expected((size_t) n_tokens, 0);
    for (size_t t = 0; t < a.size(); t++) {
        for (size_t i = 0; i < a[t].size(); i++) {
            const uint32_t kind = r.next() % 8;
            a[t][i]             = kind == 0 ? -0.0f : kind < 6 ? 0.0f : r.normal();
            if (a[t][i] != 0.0f) {
                expected[t] |= 1ull << i;
                packed[t].push_back(a[t][i]);
            }
        }
        factors.push_back(packed[t].data());
        table->nonzero(n_rows, a[t].data(), &rows[t]);
    }
    const std::string name = std::string(table->isa) + " n=" + std::to_string(n) + " rows=" + std::to_string(n_rows) +
                             " tokens=" + std::to_string(n_tokens);
    rep->check("nonzero " + name, rows == expected);
    table->add_rows(n, w.data(), expected.data(), factors.data(), n_tokens, y.data(), y_row);
    worst_element worst;
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t j = 0; j < y_row; j++) {
            double sum = 0.5, size = 0.5;
            for (int64_t i = 0; j < n && i < n_rows; i++) {
                const double term = (double) a[(size_t) t][(size_t) i] * w[(size_t) (i * n + j)];
                sum += term;
                size += fabs(term);
            }
            worst.see(t * y_row + j, y[(size_t) (t * y_row + j)], sum, EPS_F32 * (double) (n_rows + 1) * size);
        }
    }
    rep->line("add_rows " + name, worst);
}

// Beyond one word; a NaN counts as a number.
static void test_nonzero(const struct pinfer_kernel_table * table, report * rep) {
    std::vector<float> a(77, 0.0f);
    a[3] = a[63] = NAN;
    a[64] = a[76] = 1e-40f;
    uint64_t bits[2] = {~0ull, ~0ull};
    table->nonzero(77, a.data(), bits);
    rep->check(std::string(table->isa) + " nonzero", bits[0] == (1ull << 63 | 8) && bits[1] == (1ull << 12 | 1));
}

int main() {
    report                                    rep;
    size_t                                    n_tables;
    const struct pinfer_kernel_table * const * tables = pinfer_kernel_tables(&n_tables);
    rep.check("the last table is scalar", tables[n_tables - 1] == &pinfer_kernels_scalar);
    for (size_t i = 0; i + 1 < n_tables; i++) {
        for (const type_shape & t : SHAPES) {
            test_presence(tables[i], t, &rep);
            for (const int64_t n : LENGTHS) {
                if (n % t.block == 0) {
                    test_type(tables[i], t, n, &rep);
                    test_batches(tables[i], t, n, &rep);
                }
            }
            if (t.block > 1) {
                test_extremes(tables[i], t, 256, &rep);
            }
            if (t.block == 1) { // not a multiple of any vector
                test_type(tables[i], t, 77, &rep);
                test_batches(tables[i], t, 77, &rep);
            }
        }
    }
    for (size_t i = 0; i < n_tables; i++) {
        test_nonzero(tables[i], &rep);
        for (const int64_t n : { 32, 77, 160, 256 }) {
            for (const int64_t n_rows : { 1, 16, 37, 64 }) {
                test_add_rows(tables[i], n, n_rows, 1, &rep);
                test_add_rows(tables[i], n, n_rows, 33, &rep);
            }
        }
        for (int bits = 1; bits <= 2 && tables[i]->multiply_bits[0]; bits++) {
            for (const int64_t n_tokens : { 1, 3, 9 }) {
                test_bits(tables[i], bits, 32, n_tokens, &rep);
                test_bits(tables[i], bits, 2560, n_tokens, &rep);
            }
        }
    }
    return rep.finish();
}
