// avx2.cpp: primitives of 32 bytes, two registers for 64 weights. Needs AVX2, FMA and F16C; empty when compiled
// without them. Only C headers and intrinsics here, see avx512.cpp.
#include "tables.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#    include "vec_avx2.h"

namespace {

struct int8x64 {
    __m256i a, b;
};

struct scale64 { // four lanes for each 16 weights
    __m256 a, b;
};

vec vec_load_bf16(const void * p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

float load_half(const void * p) {
    return _cvtsh_ss(load_u16(p));
}

__m256i load_256(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

__m256i low_nibbles(__m256i v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}

int8x64 load_bytes(const void * a, const void * b) {
    return { load_256(a), load_256(b) };
}

int8x64 load_bytes(const void * p) {
    return { load_256(p), load_256((const char *) p + 32) };
}

__m256i load_nibbles_32(const void * p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *) p);
    return low_nibbles(_mm256_set_m128i(_mm_srli_epi64(bytes, 4), bytes));
}

int8x64 load_nibbles(const void * a, const void * b) {
    return { load_nibbles_32(a), load_nibbles_32(b) };
}

int8x64 load_nibbles_k(const void * p) {
    const __m256i bytes = load_256(p);
    return { low_nibbles(bytes), low_nibbles(_mm256_srli_epi64(bytes, 4)) };
}

int8x64 load_low_nibbles(const void * p) {
    return { low_nibbles(load_256(p)), low_nibbles(load_256((const char *) p + 32)) };
}

int8x64 load_high_nibbles(const void * p) {
    const __m256i a = load_256(p), b = load_256((const char *) p + 32);
    return { low_nibbles(_mm256_srli_epi64(a, 4)), low_nibbles(_mm256_srli_epi64(b, 4)) };
}

// Byte i of the result looks at bit i of the four bytes: every byte is copied eight times, then one bit of it tested.
__m256i load_fifth_bits_32(const void * p) {
    const __m256i copies = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit    = _mm256_set1_epi64x((long long) 0x8040201008040201u);
    const __m256i bytes  = _mm256_shuffle_epi8(_mm256_set1_epi32((int) load_u32(p)), copies);
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    return _mm256_and_si256(is_set, _mm256_set1_epi8(16));
}

int8x64 load_fifth_bits(const void * a, const void * b) {
    return { load_fifth_bits_32(a), load_fifth_bits_32(b) };
}

template <int s, int t> int8x64 load_shifted(const void * p) {
    const __m256i bytes = load_256(p);
    return { _mm256_srli_epi64(bytes, s), _mm256_srli_epi64(bytes, t) };
}

template <int mask> __m256i or_high_32(__m256i w, __m256i h) {
    return _mm256_or_si256(w, _mm256_slli_epi64(_mm256_and_si256(h, _mm256_set1_epi8(mask)), 4));
}

template <int mask> int8x64 or_high(int8x64 w, int8x64 h) {
    return { or_high_32<mask>(w.a, h.a), or_high_32<mask>(w.b, h.b) };
}

int8x64 add_bits(int8x64 w, int8x64 bits) {
    return { _mm256_or_si256(w.a, bits.a), _mm256_or_si256(w.b, bits.b) };
}

template <int c> int8x64 subtract(int8x64 w) {
    return { _mm256_sub_epi8(w.a, _mm256_set1_epi8(c)), _mm256_sub_epi8(w.b, _mm256_set1_epi8(c)) };
}

int8x64 ones(void) {
    return { _mm256_set1_epi8(1), _mm256_set1_epi8(1) };
}

__m256 scale_f16_32(const uint8_t * p) {
    return _mm256_cvtph_ps(_mm_set1_epi16((short) load_u16(p)));
}

scale64 scale_f16(const uint8_t * a, const uint8_t * b) {
    return { scale_f16_32(a), scale_f16_32(b) };
}

int8x64 load_pair_q4_0(const void * p, scale64 * s) {
    const block_q4_0 * b = (const block_q4_0 *) p;
    *s = scale_f16(b[0].d, b[1].d);
    return load_nibbles(b[0].q, b[1].q);
}

// Eight of the 32 values, rounded to nearest, halves to even.
__m256i quantise_8(const float * x, __m256 inverse) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(vec_load(x), inverse));
}

float quantise_32(const float * x, int8_t * q) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256       m    = _mm256_andnot_ps(sign, vec_load(x));
    for (int i = 8; i < 32; i += 8) {
        m = _mm256_max_ps(m, _mm256_andnot_ps(sign, vec_load(x + i)));
    }
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    most        = _mm_max_ps(most, _mm_movehl_ps(most, most));
    most        = _mm_max_ss(most, _mm_movehdup_ps(most));
    const float   largest = _mm_cvtss_f32(most);
    const __m256  inverse = vec_set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    const __m256i ab      = _mm256_packs_epi32(quantise_8(x, inverse), quantise_8(x + 8, inverse));
    const __m256i cd      = _mm256_packs_epi32(quantise_8(x + 16, inverse), quantise_8(x + 24, inverse));
    const __m256i order   = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0); // packs works within 128 bits
    _mm256_storeu_si256((__m256i *) q, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order));
    return largest / 127.0f;
}

scale64 scale_set1(float f) {
    return { _mm256_set1_ps(f), _mm256_set1_ps(f) };
}

scale64 scale_f32x2(const float * p) {
    return { _mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1) };
}

scale64 scale_f32x4(const float * p) {
    return { _mm256_set_m128(_mm_broadcast_ss(p + 1), _mm_broadcast_ss(p)),
             _mm256_set_m128(_mm_broadcast_ss(p + 3), _mm_broadcast_ss(p + 2)) };
}

scale64 scale_mul(scale64 a, scale64 b) {
    return { _mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b) };
}

void store_scales_u8(float * dst, uint64_t bytes, float f) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) bytes));
    _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(f)));
}

void store_scales_i8(float * dst, const int8_t * p, float f) {
    for (int i = 0; i < 16; i += 8) {
        const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (p + i)));
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(f)));
    }
}

vec add_mins(vec acc, uint64_t mins, const float * sums, float f) {
    const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) mins)));
    return _mm256_fmadd_ps(_mm256_mul_ps(wide, vec_load(sums)), _mm256_set1_ps(f), acc);
}

// The sums of two products stay within 16 bits: at most 2 * 128 * 127.
vec dot_unsigned_32(vec acc, __m256i w, __m256i x, __m256 s) {
    const __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), s, acc);
}

template <int c> vec dot_centred_32(vec acc, __m256i w, __m256i x, __m256 s) {
    const __m256i surplus  = _mm256_maddubs_epi16(_mm256_set1_epi8(c), x);
    const __m256i pairs    = _mm256_sub_epi16(_mm256_maddubs_epi16(w, x), surplus);
    const __m256i products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), s, acc);
}

template <int c> vec dot_centred(vec acc, int8x64 w, int8x64 x, scale64 s) {
    return dot_centred_32<c>(dot_centred_32<c>(acc, w.a, x.a, s.a), w.b, x.b, s.b);
}

vec dot_unsigned(vec acc, int8x64 w, int8x64 x, scale64 s) {
    return dot_unsigned_32(dot_unsigned_32(acc, w.a, x.a, s.a), w.b, x.b, s.b);
}

// maddubs multiplies unsigned by signed bytes: w gives its sign to x.
vec dot_signed_32(vec acc, __m256i w, __m256i x, __m256 s) {
    return dot_unsigned_32(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w), s);
}

vec dot_signed(vec acc, int8x64 w, int8x64 x, scale64 s) {
    return dot_signed_32(dot_signed_32(acc, w.a, x.a, s.a), w.b, x.b, s.b);
}

// The 8 weights from byte `first` of one register; their scale is in lane group first / 16 of s.
template <int first> __m256 widen(__m256i w) {
    const __m128i half = first < 16 ? _mm256_castsi256_si128(w) : _mm256_extracti128_si256(w, 1);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(first % 16 ? _mm_srli_si128(half, 8) : half));
}

template <int first> __m256 spread(__m256 s) {
    return _mm256_permute2f128_ps(s, s, first < 16 ? 0x00 : 0x11);
}

template <int first> void axpy_8(float * y, __m256i w, __m256 s) {
    vec_store(y + first, _mm256_fmadd_ps(spread<first>(s), widen<first>(w), vec_load(y + first)));
}

void axpy_32(float * y, __m256i w, __m256 s) {
    axpy_8<0>(y, w, s);
    axpy_8<8>(y, w, s);
    axpy_8<16>(y, w, s);
    axpy_8<24>(y, w, s);
}

void axpy_weights(float * y, int8x64 w, scale64 s) {
    axpy_32(y, w.a, s.a);
    axpy_32(y + 32, w.b, s.b);
}

template <int first> void axpy_offset_8(float * y, __m256i w, __m256 s, __m256 m) {
    const __m256 term = _mm256_fmadd_ps(spread<first>(s), widen<first>(w), spread<first>(m));
    vec_store(y + first, _mm256_add_ps(term, vec_load(y + first)));
}

void axpy_offset_32(float * y, __m256i w, __m256 s, __m256 m) {
    axpy_offset_8<0>(y, w, s, m);
    axpy_offset_8<8>(y, w, s, m);
    axpy_offset_8<16>(y, w, s, m);
    axpy_offset_8<24>(y, w, s, m);
}

void axpy_offset(float * y, int8x64 w, scale64 s, scale64 m) {
    axpy_offset_32(y, w.a, s.a, m.a);
    axpy_offset_32(y + 32, w.b, s.b, m.b);
}

void axpy_bytes(float * y, const int8_t * p, vec s) {
    for (int i = 0; i < 32; i += 8) {
        const __m256i w = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (p + i)));
        vec_store(y + i, _mm256_fmadd_ps(s, _mm256_cvtepi32_ps(w), vec_load(y + i)));
    }
}

struct nibble_map {
    __m256 s, m;
};

nibble_map map_nibbles(vec s, vec m) {
    return { s, m };
}

void axpy_nibbles_8(__m256i w, float * y, nibble_map f) {
    const __m256 term = _mm256_fmadd_ps(f.s, _mm256_cvtepi32_ps(w), f.m);
    vec_store(y, _mm256_add_ps(term, vec_load(y)));
}

void axpy_nibbles(const uint8_t * p, float * y, nibble_map f, float * z, nibble_map g) {
    for (int i = 0; i < 16; i += 8) {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (p + i)));
        axpy_nibbles_8(_mm256_and_si256(bytes, _mm256_set1_epi32(15)), y + i, f);
        axpy_nibbles_8(_mm256_srli_epi32(bytes, 4), z + i, g);
    }
}

// ---- tiles -----------------------------------------------------------------------------------------------------

typedef __m256i ivec;

constexpr int TILE_TOKENS   = 4; // sums of more would not fit into 16 registers
constexpr int SIGNED_CENTRE = 0;

// Pairs of products are summed in 16 bits: 2 * largest * 127 * tile_run stays below 2^15. Longer runs of smaller weights
// would fit, but are slower.
template <int largest> constexpr int tile_run = largest <= 63 ? 2 : 1;

ivec ivec_zero(void) {
    return _mm256_setzero_si256();
}

ivec ivec_add(ivec a, ivec b) {
    return _mm256_add_epi32(a, b);
}

vec ivec_to_vec(ivec v) {
    return _mm256_cvtepi32_ps(v);
}

template <int n> ivec ivec_bits(ivec v, int from) {
    return _mm256_and_si256(_mm256_srl_epi64(v, _mm_cvtsi32_si128(from)), _mm256_set1_epi8((1 << n) - 1));
}

ivec tile_load(const void * p) {
    return _mm256_load_si256((const __m256i *) p);
}

// Signed weights give their sign to x.
template <int largest> ivec tile_dot(ivec acc, ivec w, const void * p) {
    const __m256i x = _mm256_set1_epi32((int) load_u32(p));
    if constexpr (largest == 128) {
        return _mm256_add_epi16(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
    } else {
        return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
    }
}

template <int largest> ivec tile_widen(ivec acc) {
    return _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
}

int8x64 from_signed(int8x64 w) {
    return w;
}

// Four bytes of eight rows: rows[i] holds eight columns of them, to[c] gets column c.
void transpose_8x8(const __m256i * rows, void * const * to) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i]     = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i]     = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int c = 0; c < 4; c++) { // the halves of b[4k + c] hold columns c and c + 4 of rows 4k to 4k+3
        _mm256_store_si256((__m256i *) to[c], _mm256_permute2x128_si256(b[c], b[4 + c], 0x20));
        _mm256_store_si256((__m256i *) to[4 + c], _mm256_permute2x128_si256(b[c], b[4 + c], 0x31));
    }
}

// rows[r] holds 64 bytes of row r; group[c] gets bytes 4c to 4c+3 of every row.
[[gnu::always_inline]] inline void transpose_tile(const int8x64 * rows, void * const * group) {
    for (int r = 0; r < PINFER_TILE_ROWS; r += 8) {
        __m256i first[8], last[8];
        void *  to[16];
        for (int i = 0; i < 8; i++) {
            first[i] = rows[r + i].a;
            last[i]  = rows[r + i].b;
        }
        for (int c = 0; c < 16; c++) {
            to[c] = (char *) group[c] + 4 * r;
        }
        transpose_8x8(first, to);
        transpose_8x8(last, to + 8);
    }
}

} // namespace

#    define PINFER_HAS_TILES
#    include "body.h"

const struct pinfer_kernel_table pinfer_kernels_avx2 = { "avx2", kernels, sizeof(kernels) / sizeof(kernels[0]),
                                                         prepare_x_q8, nonzero, add_rows,
                                                         { tile_multiply_bits<1>, tile_multiply_bits<2> } };

#else

const struct pinfer_kernel_table pinfer_kernels_avx2 = { "avx2", nullptr, 0, nullptr, nullptr, nullptr, {} };

#endif
