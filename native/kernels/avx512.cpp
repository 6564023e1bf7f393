// avx512.cpp: primitives of 64 bytes. Needs AVX-512 F, BW, VL, DQ and VNNI; empty when compiled without them.
// Only C headers and intrinsics here: an inline function of the C++ library compiled with these flags could be the copy
// that the linker keeps for everyone.
#include "tables.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__)

#    include "vec_avx512.h"

namespace {

typedef __m512i int8x64;
typedef __m512  scale64; // four lanes for each 16 weights, as the dot product of four bytes leaves them

vec vec_load_bf16(const void * p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

float load_half(const void * p) {
    return _cvtsh_ss(load_u16(p));
}

int8x64 load_bytes(const void * a, const void * b) {
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) a));
    return _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i *) b), 1);
}

int8x64 load_bytes(const void * p) {
    return _mm512_loadu_si512(p);
}

int8x64 load_nibbles(const void * a, const void * b) {
    const __m256i low   = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) a));
    const __m512i both  = _mm512_castsi256_si512(_mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i *) b), 1));
    const __m512i twice = _mm512_shuffle_i64x2(both, both, 0x50); // a a b b
    const __m512i count = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi64(twice, count), _mm512_set1_epi8(15));
}

int8x64 load_nibbles_k(const void * p) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) p));
    const __m512i count = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi64(twice, count), _mm512_set1_epi8(15));
}

int8x64 load_low_nibbles(const void * p) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15));
}

int8x64 load_high_nibbles(const void * p) {
    return _mm512_and_si512(_mm512_srli_epi64(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
}

int8x64 load_fifth_bits(const void * a, const void * b) {
    const __mmask64 bits = (__mmask64) load_u32(a) | (__mmask64) load_u32(b) << 32;
    return _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(16));
}

template <int s, int t> int8x64 load_shifted(const void * p) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) p));
    return _mm512_srlv_epi64(twice, _mm512_set_epi64(t, t, t, t, s, s, s, s));
}

template <int mask> int8x64 or_high(int8x64 w, int8x64 h) {
    return _mm512_or_si512(w, _mm512_slli_epi64(_mm512_and_si512(h, _mm512_set1_epi8(mask)), 4));
}

int8x64 add_bits(int8x64 w, int8x64 bits) {
    return _mm512_or_si512(w, bits);
}

template <int c> int8x64 subtract(int8x64 w) {
    return _mm512_sub_epi8(w, _mm512_set1_epi8(c));
}

int8x64 ones(void) {
    return _mm512_set1_epi8(1);
}

scale64 scale_f16(const uint8_t * a, const uint8_t * b) {
    const __m256i halves =
        _mm256_mask_set1_epi16(_mm256_set1_epi16((short) load_u16(a)), 0xff00, (short) load_u16(b));
    return _mm512_cvtph_ps(halves);
}

// Words 0 and 9 of the 18 are the scales, the others bytes of two nibbles. Two loads that overlap, since one under a mask
// does not set the hardware's prefetcher off: rows in a stream came at a third of the speed.
int8x64 load_pair_q4_0(const void * p, scale64 * s) {
    const __m512i words = load_bytes(p, (const uint8_t *) p + 4); // 0 to 15, and 2 to 17 from place 16 on
    const __m512i each  = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 31, 30, 29, 28, 27, 26, 25, 24,
                                           8, 7, 6, 5, 4, 3, 2, 1, 8, 7, 6, 5, 4, 3, 2, 1);
    const __m256i halves = _mm256_set_epi16(9, 9, 9, 9, 9, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i count  = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    *s = _mm512_cvtph_ps(_mm256_permutexvar_epi16(halves, _mm512_castsi512_si256(words)));
    return _mm512_and_si512(_mm512_srlv_epi64(_mm512_permutexvar_epi16(each, words), count), _mm512_set1_epi8(15));
}

// Rounds to nearest, halves to even.
float quantise_32(const float * x, int8_t * q) {
    const __m512 a = vec_load(x), b = vec_load(x + 16);
    const float  largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const __m512 inverse = vec_set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    _mm_storeu_si128((__m128i *) q, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse))));
    _mm_storeu_si128((__m128i *) (q + 16), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, inverse))));
    return largest / 127.0f;
}

scale64 scale_set1(float f) {
    return _mm512_set1_ps(f);
}

scale64 scale_f32x2(const float * p) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(p[0]), 0xff00, _mm_load_ss(p + 1));
}

scale64 scale_f32x4(const float * p) {
    const __m512i each = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(each, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

scale64 scale_mul(scale64 a, scale64 b) {
    return _mm512_mul_ps(a, b);
}

void store_scales_u8(float * dst, uint64_t bytes, float f) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) bytes));
    _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(f)));
}

void store_scales_i8(float * dst, const int8_t * p, float f) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p));
    _mm512_storeu_ps(dst, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(f)));
}

vec add_mins(vec acc, uint64_t mins, const float * sums, float f) {
    const __m256 wide  = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) mins)));
    const __m256 terms = _mm256_mul_ps(_mm256_mul_ps(wide, _mm256_loadu_ps(sums)), _mm256_set1_ps(f));
    return _mm512_add_ps(acc, _mm512_zextps256_ps512(terms));
}

vec dot_unsigned(vec acc, int8x64 w, int8x64 x, scale64 s) {
    const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), s, acc);
}

template <int c> vec dot_centred(vec acc, int8x64 w, int8x64 x, scale64 s) {
    const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, x);
    const __m512i surplus  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(c), x);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(products, surplus)), s, acc);
}

#    define PINFER_HAS_DOT_LANES

vec dot_lanes(vec acc, int8x64 w, scale64 s, const int8_t * x, const x_q8_lanes * lanes) {
    const __m512i products = _mm512_dpbusd_epi32(_mm512_loadu_si512(lanes->start), w, _mm512_loadu_si512(x));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(s, _mm512_loadu_ps(lanes->d)), acc);
}

// VNNI multiplies unsigned by signed bytes: w gives its sign to x.
vec dot_signed(vec acc, int8x64 w, int8x64 x, scale64 s) {
    const __m512i signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    return dot_unsigned(acc, _mm512_abs_epi8(w), signed_x, s);
}

template <int quarter> void axpy_quarter(float * y, int8x64 w, scale64 s) {
    const __m512 wf = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(w, quarter)));
    const __m512 sq = _mm512_shuffle_f32x4(s, s, quarter * 0x55);
    vec_store(y + 16 * quarter, _mm512_fmadd_ps(sq, wf, vec_load(y + 16 * quarter)));
}

void axpy_weights(float * y, int8x64 w, scale64 s) {
    axpy_quarter<0>(y, w, s);
    axpy_quarter<1>(y, w, s);
    axpy_quarter<2>(y, w, s);
    axpy_quarter<3>(y, w, s);
}

template <int quarter> void axpy_offset_quarter(float * y, int8x64 w, scale64 s, scale64 m) {
    const __m512 wf = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(w, quarter)));
    const __m512 sq = _mm512_shuffle_f32x4(s, s, quarter * 0x55);
    const __m512 mq = _mm512_shuffle_f32x4(m, m, quarter * 0x55);
    vec_store(y + 16 * quarter, _mm512_add_ps(_mm512_fmadd_ps(sq, wf, mq), vec_load(y + 16 * quarter)));
}

void axpy_offset(float * y, int8x64 w, scale64 s, scale64 m) {
    axpy_offset_quarter<0>(y, w, s, m);
    axpy_offset_quarter<1>(y, w, s, m);
    axpy_offset_quarter<2>(y, w, s, m);
    axpy_offset_quarter<3>(y, w, s, m);
}

void axpy_bytes(float * y, const int8_t * p, vec s) {
    for (int i = 0; i < 32; i += 16) {
        const __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) (p + i))));
        vec_store(y + i, _mm512_fmadd_ps(s, w, vec_load(y + i)));
    }
}

typedef __m512 nibble_map; // its 16 values

nibble_map map_nibbles(vec s, vec m) {
    const __m512 nibbles = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_fmadd_ps(s, nibbles, m);
}

void axpy_nibbles(const uint8_t * p, float * y, nibble_map f, float * z, nibble_map g) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    // The permutation looks at the low four bits of its index alone.
    vec_store(y, _mm512_add_ps(_mm512_permutexvar_ps(bytes, f), vec_load(y)));
    vec_store(z, _mm512_add_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), g), vec_load(z)));
}

// ---- tiles -----------------------------------------------------------------------------------------------------

typedef __m512i ivec;

constexpr int TILE_TOKENS   = 8;
constexpr int SIGNED_CENTRE = 128; // VNNI multiplies unsigned by signed bytes

template <int largest> constexpr int tile_run = 8;

ivec ivec_zero(void) {
    return _mm512_setzero_si512();
}

ivec ivec_add(ivec a, ivec b) {
    return _mm512_add_epi32(a, b);
}

vec ivec_to_vec(ivec v) {
    return _mm512_cvtepi32_ps(v);
}

template <int n> ivec ivec_bits(ivec v, int from) {
    return _mm512_and_si512(_mm512_srl_epi64(v, _mm_cvtsi32_si128(from)), _mm512_set1_epi8((1 << n) - 1));
}

ivec tile_load(const void * p) {
    return _mm512_loadu_si512(p);
}

template <int largest> ivec tile_dot(ivec acc, ivec w, const void * x) {
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32((int) load_u32(x)));
}

template <int largest> ivec tile_widen(ivec acc) {
    return acc;
}

int8x64 from_signed(int8x64 w) {
    return _mm512_xor_si512(w, _mm512_set1_epi8((char) 0x80));
}

// rows[r] holds 64 bytes of row r; group[c] gets bytes 4c to 4c+3 of every row.
[[gnu::always_inline]] inline void transpose_tile(const int8x64 * rows, void * const * group) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i]     = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i]     = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    // 128-bit lane l of b[4k + c] holds bytes 4 * (4l + c) to 4 * (4l + c) + 3 of rows 4k to 4k+3
    for (int c = 0; c < 4; c++) {
        const __m512i low   = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);
        const __m512i high  = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i low1  = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
        const __m512i high1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        _mm512_store_si512(group[c], _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_store_si512(group[8 + c], _mm512_shuffle_i32x4(low, high, 0xdd));
        _mm512_store_si512(group[4 + c], _mm512_shuffle_i32x4(low1, high1, 0x88));
        _mm512_store_si512(group[12 + c], _mm512_shuffle_i32x4(low1, high1, 0xdd));
    }
}

} // namespace

#    define PINFER_HAS_TILES
#    include "body.h"

const struct pinfer_kernel_table pinfer_kernels_avx512 = { "avx512", kernels, sizeof(kernels) / sizeof(kernels[0]),
                                                           prepare_x_q8, nonzero, add_rows,
                                                           { tile_multiply_bits<1>, tile_multiply_bits<2> } };

#else

const struct pinfer_kernel_table pinfer_kernels_avx512 = { "avx512", nullptr, 0, nullptr, nullptr, nullptr, {} };

#endif
