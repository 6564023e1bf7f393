// vec_avx512.h: what the kernels and the attention share of a register of 16 floats. For files compiled with
// AVX-512 F and DQ; in the anonymous namespace, so that no copy leaves them (see avx512.cpp).
#pragma once

#include "blocks.h"

#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 takes the don't-care operand inside its own intrinsics for an uninitialised variable of ours (GCC bug 105593).
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

namespace {

typedef __m512 vec;

constexpr int VEC_LANES = 16;

vec vec_zero(void) {
    return _mm512_setzero_ps();
}

vec vec_set1(float f) {
    return _mm512_set1_ps(f);
}

vec vec_load(const float * p) {
    return _mm512_loadu_ps(p);
}

vec vec_load_f16(const void * p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

vec vec_load_i8(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}

void vec_store(float * p, vec v) {
    _mm512_storeu_ps(p, v);
}

vec vec_add(vec a, vec b) {
    return _mm512_add_ps(a, b);
}

vec vec_mul(vec a, vec b) {
    return _mm512_mul_ps(a, b);
}

vec vec_set1_f16(const void * p) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((short) load_u16(p)));
}

vec vec_fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}

// A bit for each lane.
[[maybe_unused]] uint32_t vec_nonzero(vec v) {
    return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}

float vec_sum(vec v) {
    return _mm512_reduce_add_ps(v);
}

} // namespace
