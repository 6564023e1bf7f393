// avx2.cpp: primitives of 8 floats. Needs AVX2, FMA and F16C; empty when compiled without them. Only C headers and intrinsics
// here, see ../kernels/avx512.cpp.
#include "step.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#    include "vec_avx2.h"

#    include <math.h>

namespace {

constexpr int VEC_SUMS = 8;

template <int shift> vec vec_load_nibbles(const uint8_t * p) {
    const __m256i wide = _mm256_srli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p)), shift);
    return _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
}

vec vec_max(vec a, vec b) {
    return _mm256_max_ps(a, b);
}

vec vec_round(vec v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

vec vec_times_power(vec v, vec n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(v, _mm256_castsi256_ps(exponent));
}

vec vec_zero_where_below(vec v, vec x, float limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ), v);
}

vec vec_masked(vec v, vec m) {
    return _mm256_blendv_ps(v, m, _mm256_cmp_ps(m, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ));
}

float vec_largest(vec v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two  = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Sums of eight vectors at p: pairs of neighbouring lanes are added until each half of a vector has one sum a lane.
vec eight_sums(const float * p) {
    const vec ab = _mm256_hadd_ps(vec_load(p), vec_load(p + 8)), cd = _mm256_hadd_ps(vec_load(p + 16), vec_load(p + 24));
    const vec ef = _mm256_hadd_ps(vec_load(p + 32), vec_load(p + 40)), gh = _mm256_hadd_ps(vec_load(p + 48), vec_load(p + 56));
    const vec low = _mm256_hadd_ps(ab, cd), high = _mm256_hadd_ps(ef, gh);
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

void vec_sums(const float * p, float * out) {
    vec_store(out, eight_sums(p));
    vec_store(out + 8, eight_sums(p + 64));
}

} // namespace

#    include "body.h"

const struct pinfer_attention_table pinfer_attention_avx2 = {.isa = "avx2", .attend = attend};

#else
const struct pinfer_attention_table pinfer_attention_avx2 = {.isa = "avx2", .attend = nullptr};
#endif
