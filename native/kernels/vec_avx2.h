// vec_avx2.h: what the kernels and the attention share of a register of 8 floats. For files compiled with
// AVX2, FMA and F16C; in the anonymous namespace, so that no copy leaves them (see avx512.cpp).
#pragma once

#include "blocks.h"

#include <immintrin.h>

namespace {

typedef __m256 vec;

constexpr int VEC_LANES = 8;

vec vec_zero(void) {
    return _mm256_setzero_ps();
}

vec vec_set1(float f) {
    return _mm256_set1_ps(f);
}

vec vec_load(const float * p) {
    return _mm256_loadu_ps(p);
}

vec vec_load_f16(const void * p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
}

vec vec_load_i8(const int8_t * p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
}

void vec_store(float * p, vec v) {
    _mm256_storeu_ps(p, v);
}

vec vec_add(vec a, vec b) {
    return _mm256_add_ps(a, b);
}

vec vec_mul(vec a, vec b) {
    return _mm256_mul_ps(a, b);
}

vec vec_set1_f16(const void * p) {
    return _mm256_cvtph_ps(_mm_set1_epi16((short) load_u16(p)));
}

vec vec_fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}

// A bit for each lane.
[[maybe_unused]] uint32_t vec_nonzero(vec v) {
    return (uint32_t) _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}

float vec_sum(vec v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two  = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

} // namespace
