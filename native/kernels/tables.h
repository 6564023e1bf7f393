// tables.h: one table of kernels per instruction set, and which of them this machine can run. Internal to
// native/kernels and its tests.
#pragma once

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

struct pinfer_kernel_table {
    const char *                 isa;
    const struct pinfer_kernel * kernels;
    size_t                       n; // 0: not compiled for this machine's architecture
    void (*prepare_x_q8)(const float * x, void * dst, int64_t n);
    pinfer_nonzero_fn  nonzero;
    pinfer_add_rows_fn add_rows;
    pinfer_multiply_fn multiply_bits[2]; // tiles of 1 and of 2 bits; NULL in tables without tiles, but for the scalar one
};

extern const struct pinfer_kernel_table pinfer_kernels_scalar;
extern const struct pinfer_kernel_table pinfer_kernels_avx2;
extern const struct pinfer_kernel_table pinfer_kernels_avx512;
extern const struct pinfer_kernel_table pinfer_kernels_neon;

// The tables that this machine can run, best first; scalar is always the last one.
const struct pinfer_kernel_table * const * pinfer_kernel_tables(size_t * n);

// Kernels of a type in one table, NULL if the table has none.
const struct pinfer_kernel * pinfer_kernel_table_find(const struct pinfer_kernel_table * table, enum ggml_type type);

#ifdef __cplusplus
}
#endif
