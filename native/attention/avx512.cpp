// avx512.cpp: primitives of 16 floats. Needs AVX-512 F and DQ; empty when compiled without them. Only C headers and intrinsics
// here, see ../kernels/avx512.cpp.
#include "step.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#    include "blocks.h"

#    if defined(__GNUC__) && !defined(__clang__)
#        pragma GCC diagnostic ignored "-Wuninitialized" // GCC bug 105593, see ../kernels/avx512.cpp
#        pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    endif
#    include <immintrin.h>
#    include <math.h>

namespace {

typedef __m512 vec;

constexpr int VEC_LANES = 16;
constexpr int VEC_SUMS  = 16;

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

vec vec_set1_f16(const void * p) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((short) load_u16(p)));
}

vec vec_load_i8(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}

template <int shift> vec vec_load_nibbles(const uint8_t * p) {
    const __m512i wide = _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)), shift);
    return _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
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

vec vec_fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}

vec vec_max(vec a, vec b) {
    return _mm512_max_ps(a, b);
}

vec vec_round(vec v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

vec vec_times_power(vec v, vec n) {
    return _mm512_scalef_ps(v, n);
}

vec vec_zero_where_below(vec v, vec x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), v);
}

vec vec_masked(vec v, vec m) {
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(m, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), m);
}

float vec_sum(vec v) {
    return _mm512_reduce_add_ps(v);
}

float vec_largest(vec v) {
    return _mm512_reduce_max_ps(v);
}

// Sums of four vectors at p within each quarter of 4 lanes: lane i of each has vector i's.
vec four_sums(const float * p) {
    const vec a = vec_load(p), b = vec_load(p + 16), c = vec_load(p + 32), d = vec_load(p + 48);
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}

// Adds quarters of a 2 apart, the same of b: a.02 a.13 b.02 b.13
vec half_sums(vec a, vec b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

void vec_sums(const float * p, float * out) {
    const vec low = half_sums(four_sums(p), four_sums(p + 64)), high = half_sums(four_sums(p + 128), four_sums(p + 192));
    vec_store(out, _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
}

} // namespace

#    include "body.h"

const struct pinfer_attention_table pinfer_attention_avx512 = {.isa = "avx512", .attend = attend};

#else
const struct pinfer_attention_table pinfer_attention_avx512 = {.isa = "avx512", .attend = nullptr};
#endif
