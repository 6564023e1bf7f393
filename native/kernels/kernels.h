// kernels.h: the arithmetic of neuron rows, one table of function pointers per ggml type and instruction set.
//
// A row is n values of one ggml type in ggml's standard layout (n a multiple of the type's block size; rows need no
// alignment beyond that of the type). x is the FFN input of one token, prepared once per token by pinfer_kernel_prepare
// into x_type. Every kernel has a scalar reference; a type without kernels of its own uses ggml's vec_dot and to_float.
//
// One token is multiplied row by row (dot). Several tokens share the work of unpacking: quantised rows are packed into
// tiles of PINFER_TILE_ROWS rows and multiplied by all tokens at once, float rows are loaded once for several tokens.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The x_type of quantised rows that have kernels here: n signed bytes and float scales, see pinfer_x_q8 in blocks.h.
#define PINFER_X_Q8 GGML_TYPE_COUNT

#define PINFER_TILE_ROWS 16

// sum_j row[j] * x[j]; x in x_type
typedef float (*pinfer_dot_fn)(int64_t n, const void * row, const void * x);
// y[j] += a * row[j]; scratch holds n floats (used by types that are dequantised first)
typedef void (*pinfer_axpy_fn)(int64_t n, float a, const void * row, float * y, float * scratch);
// out[t] = sum_j row[j] * x_t[j] for n_tokens prepared x, x_row bytes apart
typedef void (*pinfer_dot_many_fn)(int64_t n, const void * row, const void * x, size_t x_row, int64_t n_tokens,
                                   float * out);
// y[t*n + j] += sum_r a[r*n_tokens + t] * rows[r][j] for n_rows rows and n_tokens tokens
typedef void (*pinfer_accumulate_fn)(int64_t n, int64_t n_rows, const void * const * rows, const float * a,
                                     int64_t n_tokens, float * y);
// Columns [begin, end) of PINFER_TILE_ROWS rows into a tile of pinfer_tile_size(end - begin) bytes, 64-byte aligned.
// begin and end are multiples of the type's block size.
typedef void (*pinfer_pack_fn)(int64_t begin, int64_t end, const void * const * rows, void * tile);
// out[t*out_row + r] += sum_j tile[r][j] * x_t[j] over the tile's columns [begin, end) of x's n
typedef void (*pinfer_multiply_fn)(int64_t n, int64_t begin, int64_t end, const void * tile, const void * x,
                                   size_t x_row, int64_t n_tokens, float * out, int64_t out_row);

// Bit i % 64 of bits[i / 64] says whether a[i] is not 0, for i < n; the rest of the last word is 0
typedef void (*pinfer_nonzero_fn)(int64_t n, const float * a, uint64_t * bits);
// y[t*y_row + j] += sum of *a[t]++ * w[r*n + j] over the rows r whose bit is in rows[t], in their order, for j < n. The
// pointers stay as they are.
typedef void (*pinfer_add_rows_fn)(int64_t n, const float * w, const uint64_t * rows, const float * const * a, int64_t n_tokens,
                                   float * y, int64_t y_row);

// What is NULL falls back: dot and axpy to ggml (call pinfer_kernel_dot and pinfer_kernel_axpy, which know), dot_many
// to dot, accumulate to axpy, pack and multiply to dot_many.
struct pinfer_kernel {
    enum ggml_type       type;
    enum ggml_type       x_type;
    pinfer_dot_fn        dot;
    pinfer_axpy_fn       axpy;
    pinfer_accumulate_fn accumulate;
    pinfer_dot_many_fn   dot_many;
    pinfer_pack_fn       pack; // together with multiply
    pinfer_multiply_fn   multiply;
    pinfer_pack_fn       pack_small; // tiles that are kept in memory: as small as the rows (Q4_0, Q8_0)
    pinfer_multiply_fn   multiply_small;
};

// Kernels of a type for the instruction set in use, NULL for a type that llama.cpp cannot multiply.
// The pointer stays valid for the life of the process.
const struct pinfer_kernel * pinfer_kernel_get(enum ggml_type type);

float pinfer_kernel_dot (const struct pinfer_kernel * k, int64_t n, const void * row, const void * x);
void  pinfer_kernel_axpy(const struct pinfer_kernel * k, int64_t n, float a, const void * row, float * y,
                         float * scratch);
void  pinfer_kernel_dot_many(const struct pinfer_kernel * k, int64_t n, const void * row, const void * x, size_t x_row,
                             int64_t n_tokens, float * out);
void  pinfer_kernel_accumulate(const struct pinfer_kernel * k, int64_t n, int64_t n_rows, const void * const * rows,
                               const float * a, int64_t n_tokens, float * y, float * scratch);

// Many tokens, each with its own few rows: the rows are unpacked to floats first, PINFER_SUM_COLUMNS of them at a time.
#define PINFER_SUM_ROWS    64
#define PINFER_SUM_COLUMNS 256
void pinfer_kernel_nonzero(int64_t n, const float * a, uint64_t * bits);
void pinfer_kernel_add_rows(int64_t n, const float * w, const uint64_t * rows, const float * const * a, int64_t n_tokens,
                            float * y, int64_t y_row);

// Bytes of a tile of n columns (n a multiple of 32). A small one takes as many as its rows.
size_t pinfer_tile_size(int64_t n);

// Rows of n numbers of 1 bit (-1, 1) or 2 bits (-3, -1, 1, 3), as predictor.gguf holds them: number j is
// 2*q - (2^bits - 1) with q at bit j*bits of the row. Tiles of them are multiplied by x in PINFER_X_Q8; n is a multiple
// of 32. `bits` is 1 or 2.
size_t             pinfer_bits_tile_size(int bits, int64_t n);
void               pinfer_bits_pack(int bits, int64_t n, const void * const * rows, void * tile);
pinfer_multiply_fn pinfer_bits_multiply(int bits);

// Bytes of n prepared values, and the preparation itself (x_type F32: a copy).
size_t pinfer_kernel_prepared_size(enum ggml_type x_type, int64_t n);
void   pinfer_kernel_prepare(enum ggml_type x_type, const float * x, void * dst, int64_t n);

// "avx512", "avx2", "neon", "scalar". PINFER_ISA forces one that the machine has; anything else is ignored with a
// warning.
const char * pinfer_kernel_isa(void);

#ifdef __cplusplus
}
#endif
