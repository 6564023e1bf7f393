// avx512.cpp: primitives of 16 floats. Needs AVX-512 F and DQ; empty when compiled without them. Only C headers and intrinsics
// here, see ../kernels/avx512.cpp.
#include "step.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#    include "vec_avx512.h"

#    include <math.h>

namespace {

constexpr int VEC_SUMS = 16;

template <int shift> vec vec_load_nibbles(const uint8_t * p) {
    const __m512i wide = _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)), shift);
    return _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
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
