// dispatch.cpp: the public interface of kernels.h. Chooses a table once, and gives the types that no table knows to
// ggml.
#include "blocks.h"
#include "ggml-cpu.h"
#include "tables.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

// PINFER_ISA if this machine has it, else the best there is.
const struct pinfer_kernel_table * choose_table(void) {
    size_t                                    n;
    const struct pinfer_kernel_table * const * tables = pinfer_kernel_tables(&n);
    const char *                              forced = getenv("PINFER_ISA");
    if (forced == nullptr || forced[0] == '\0') {
        return tables[0];
    }
    for (size_t i = 0; i < n; i++) {
        if (strcmp(forced, tables[i]->isa) == 0) {
            return tables[i];
        }
    }
    fprintf(stderr, "pinfer: PINFER_ISA=%s is not among this machine's kernels (", forced);
    for (size_t i = 0; i < n; i++) {
        fprintf(stderr, "%s%s", i ? " " : "", tables[i]->isa);
    }
    fprintf(stderr, "); using %s\n", tables[0]->isa);
    return tables[0];
}

struct kernel_set {
    const char *         isa;
    struct pinfer_kernel kernels[GGML_TYPE_COUNT];
    bool                 known[GGML_TYPE_COUNT];
    void (*prepare_x_q8)(const float * x, void * dst, int64_t n);
    pinfer_nonzero_fn  nonzero;
    pinfer_add_rows_fn add_rows;
    pinfer_multiply_fn multiply_bits[2];

    kernel_set() {
        ggml_cpu_init(); // fills the tables that ggml's own vec_dot reads; does nothing the second time
        const struct pinfer_kernel_table * table = choose_table();
        isa                                      = table->isa;
        prepare_x_q8                             = table->prepare_x_q8;
        nonzero                                  = table->nonzero;
        add_rows                                 = table->add_rows;
        for (int i = 0; i < 2; i++) {
            multiply_bits[i] = table->multiply_bits[i] ? table->multiply_bits[i] : pinfer_kernels_scalar.multiply_bits[i];
        }
        for (int i = 0; i < GGML_TYPE_COUNT; i++) {
            add((enum ggml_type) i, pinfer_kernel_table_find(table, (enum ggml_type) i));
        }
    }

    void add(enum ggml_type type, const struct pinfer_kernel * own) {
        known[type] = own != nullptr || ggml_can_multiply(type);
        if (own != nullptr) {
            kernels[type] = *own;
        } else if (known[type]) {
            kernels[type]        = {};
            kernels[type].type   = type;
            kernels[type].x_type = ggml_get_type_traits_cpu(type)->vec_dot_type;
        }
    }

    // Multiplied by ggml as a row of weights, readable as floats, and its x can be prepared.
    static bool ggml_can_multiply(enum ggml_type type) {
        const struct ggml_type_traits_cpu * cpu = ggml_get_type_traits_cpu(type);
        return cpu->vec_dot != nullptr && ggml_get_type_traits(type)->to_float != nullptr &&
               ggml_get_type_traits_cpu(cpu->vec_dot_type)->from_float != nullptr;
    }
};

const kernel_set & kernels(void) {
    static const kernel_set set;
    return set;
}

} // namespace

const struct pinfer_kernel * pinfer_kernel_get(enum ggml_type type) {
    if ((int) type < 0 || type >= GGML_TYPE_COUNT) {
        return nullptr;
    }
    const kernel_set & set = kernels();
    return set.known[type] ? &set.kernels[type] : nullptr;
}

const char * pinfer_kernel_isa(void) {
    return kernels().isa;
}

float pinfer_kernel_dot(const struct pinfer_kernel * k, int64_t n, const void * row, const void * x) {
    if (k->dot != nullptr) {
        return k->dot(n, row, x);
    }
    float sum = 0.0f;
    ggml_get_type_traits_cpu(k->type)->vec_dot((int) n, &sum, 0, row, 0, x, 0, 1);
    return sum;
}

void pinfer_kernel_axpy(const struct pinfer_kernel * k, int64_t n, float a, const void * row, float * y,
                        float * scratch) {
    if (k->axpy != nullptr) {
        k->axpy(n, a, row, y, scratch);
        return;
    }
    ggml_get_type_traits(k->type)->to_float(row, scratch, n);
    const struct pinfer_kernel * f32 = pinfer_kernel_get(GGML_TYPE_F32);
    f32->axpy(n, a, scratch, y, nullptr);
}

void pinfer_kernel_dot_many(const struct pinfer_kernel * k, int64_t n, const void * row, const void * x, size_t x_row,
                            int64_t n_tokens, float * out) {
    if (k->dot_many != nullptr) {
        k->dot_many(n, row, x, x_row, n_tokens, out);
        return;
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        out[t] = pinfer_kernel_dot(k, n, row, (const char *) x + (size_t) t * x_row);
    }
}

void pinfer_kernel_accumulate(const struct pinfer_kernel * k, int64_t n, int64_t n_rows, const void * const * rows,
                              const float * a, int64_t n_tokens, float * y, float * scratch) {
    if (k->accumulate != nullptr) {
        k->accumulate(n, n_rows, rows, a, n_tokens, y);
        return;
    }
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t t = 0; t < n_tokens; t++) {
            if (a[r * n_tokens + t] != 0.0f) {
                pinfer_kernel_axpy(k, n, a[r * n_tokens + t], rows[r], y + t * n, scratch);
            }
        }
    }
}

void pinfer_kernel_nonzero(int64_t n, const float * a, uint64_t * bits) {
    kernels().nonzero(n, a, bits);
}

void pinfer_kernel_add_rows(int64_t n, const float * w, const uint64_t * rows, const float * const * a, int64_t n_tokens,
                            float * y, int64_t y_row) {
    kernels().add_rows(n, w, rows, a, n_tokens, y, y_row);
}

size_t pinfer_tile_size(int64_t n) {
    return (size_t) n / 32 * sizeof(tile_group);
}

size_t pinfer_bits_tile_size(int bits, int64_t n) {
    return (size_t) n / 32 * (bits == 1 ? sizeof(tile_group_bits<1>) : sizeof(tile_group_bits<2>));
}

void pinfer_bits_pack(int bits, int64_t n, const void * const * rows, void * tile) {
    uint8_t * const to = (uint8_t *) tile;
    memset(to, 0, pinfer_bits_tile_size(bits, n));
    for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
        const uint8_t * row = (const uint8_t *) rows[r];
        for (int64_t j = 0; j < n; j++) {
            const int q = row[j * bits / 8] >> (j * bits % 8) & ((1 << bits) - 1);
            const int c = (int) (j % 32 / 4);
            to[((j / 32 * bits + c % bits) * PINFER_TILE_ROWS + r) * 4 + j % 4] |= (uint8_t) (q << (c / bits * bits));
        }
    }
}

pinfer_multiply_fn pinfer_bits_multiply(int bits) {
    return kernels().multiply_bits[bits - 1];
}

size_t pinfer_kernel_prepared_size(enum ggml_type x_type, int64_t n) {
    return x_type == PINFER_X_Q8 ? x_q8_size(n) : ggml_row_size(x_type, n);
}

void pinfer_kernel_prepare(enum ggml_type x_type, const float * x, void * dst, int64_t n) {
    if (x_type == PINFER_X_Q8) {
        kernels().prepare_x_q8(x, dst, n);
    } else if (x_type == GGML_TYPE_F32) {
        memcpy(dst, x, (size_t) n * sizeof(float));
    } else {
        kernels(); // ggml_cpu_init
        ggml_get_type_traits_cpu(x_type)->from_float(x, dst, n);
    }
}
