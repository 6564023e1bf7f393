// kernels.h: the arithmetic of one neuron row, one table of function pointers per ggml type and instruction set.
//
// A row is n values of one ggml type in ggml's standard layout (n a multiple of the type's block size; rows need no
// alignment beyond that of the type). x is the FFN input of one token, prepared once per token by pinfer_kernel_prepare
// into x_type. Every kernel has a scalar reference; a type without kernels of its own uses ggml's vec_dot and to_float.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// sum_j row[j] * x[j]; x in x_type
typedef float (*pinfer_dot_fn)(int64_t n, const void * row, const void * x);
// y[j] += a * row[j]; scratch holds n floats (used by types that are dequantised first)
typedef void (*pinfer_axpy_fn)(int64_t n, float a, const void * row, float * y, float * scratch);

struct pinfer_kernel {
    enum ggml_type type;
    enum ggml_type x_type;
    pinfer_dot_fn  dot;  // both NULL for a type without kernels of its own: call pinfer_kernel_dot()
    pinfer_axpy_fn axpy; // and pinfer_kernel_axpy(), which know what to do then
};

// Kernels of a type for the instruction set in use, NULL for a type that llama.cpp cannot multiply.
// The pointer stays valid for the life of the process.
const struct pinfer_kernel * pinfer_kernel_get(enum ggml_type type);

float pinfer_kernel_dot (const struct pinfer_kernel * k, int64_t n, const void * row, const void * x);
void  pinfer_kernel_axpy(const struct pinfer_kernel * k, int64_t n, float a, const void * row, float * y,
                         float * scratch);

// Bytes of n prepared values, and the preparation itself (x_type F32: a copy).
size_t pinfer_kernel_prepared_size(enum ggml_type x_type, int64_t n);
void   pinfer_kernel_prepare(enum ggml_type x_type, const float * x, void * dst, int64_t n);

// "avx512", "avx2", "neon", "scalar". PINFER_ISA forces one that the machine has; anything else is ignored with a
// warning.
const char * pinfer_kernel_isa(void);

#ifdef __cplusplus
}
#endif
