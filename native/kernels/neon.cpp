// neon.cpp: primitives of 16 bytes, four registers for 64 weights. Base ARMv8 suffices; the dot product instructions
// are used where the compiler may (-march=armv8.2-a+dotprod). Empty on other machines.
#include "tables.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#    include "blocks.h"

#    include <arm_neon.h>

namespace {

typedef float32x4_t vec;
typedef int8x16x4_t int8x64;

struct scale64 { // one for each 16 weights
    float s[4];
};

constexpr int VEC_LANES = 4;

vec vec_zero(void) {
    return vdupq_n_f32(0.0f);
}

vec vec_set1(float f) {
    return vdupq_n_f32(f);
}

vec vec_load(const float * p) {
    return vld1q_f32(p);
}

vec vec_load_f16(const void * p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *) p)));
}

vec vec_load_bf16(const void * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *) p)), 16));
}

vec vec_load_i8(const int8_t * p) {
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(load_u32(p))));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

void vec_store(float * p, vec v) {
    vst1q_f32(p, v);
}

vec vec_add(vec a, vec b) {
    return vaddq_f32(a, b);
}

vec vec_mul(vec a, vec b) {
    return vmulq_f32(a, b);
}

vec vec_fma(vec a, vec b, vec c) {
    return vfmaq_f32(c, a, b);
}

uint32_t vec_nonzero(vec v) {
    const uint32_t    bits[4] = {1, 2, 4, 8};
    const uint32x4_t  zero    = vceqq_f32(v, vdupq_n_f32(0.0f));
    return vaddvq_u32(vbicq_u32(vld1q_u32(bits), zero));
}

float vec_sum(vec v) {
    return vaddvq_f32(v);
}

float load_half(const void * p) {
    __fp16 h;
    memcpy(&h, p, sizeof(h));
    return (float) h;
}

vec vec_set1_f16(const void * p) {
    return vdupq_n_f32(load_half(p));
}

int8x16_t load_128(const void * p) {
    return vld1q_s8((const int8_t *) p);
}

int8x16_t low_nibbles(int8x16_t v) {
    return vandq_s8(v, vdupq_n_s8(15));
}

template <int n> int8x16_t shift_right(int8x16_t v) {
    if constexpr (n == 0) {
        return v;
    } else {
        return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), n));
    }
}

int8x64 load_64(const void * a, const void * b, const void * c, const void * d) {
    return { { load_128(a), load_128(b), load_128(c), load_128(d) } };
}

int8x64 load_bytes(const void * a, const void * b) {
    return load_64(a, (const char *) a + 16, b, (const char *) b + 16);
}

int8x64 load_bytes(const void * p) {
    return load_bytes(p, (const char *) p + 32);
}

int8x64 load_nibbles(const void * a, const void * b) {
    const int8x16_t va = load_128(a), vb = load_128(b);
    return { { low_nibbles(va), shift_right<4>(va), low_nibbles(vb), shift_right<4>(vb) } };
}

int8x64 load_nibbles_k(const void * p) {
    const int8x16_t a = load_128(p), b = load_128((const char *) p + 16);
    return { { low_nibbles(a), low_nibbles(b), shift_right<4>(a), shift_right<4>(b) } };
}

int8x64 load_low_nibbles(const void * p) {
    int8x64 v = load_bytes(p, (const char *) p + 32);
    for (int i = 0; i < 4; i++) {
        v.val[i] = low_nibbles(v.val[i]);
    }
    return v;
}

int8x64 load_high_nibbles(const void * p) {
    int8x64 v = load_bytes(p, (const char *) p + 32);
    for (int i = 0; i < 4; i++) {
        v.val[i] = shift_right<4>(v.val[i]);
    }
    return v;
}

// Byte i of the result looks at bit i of the two bytes: each is copied eight times, then one bit of it tested.
int8x16_t load_fifth_bits_16(const uint8_t * p) {
    const uint8x16_t bytes = vcombine_u8(vdup_n_u8(p[0]), vdup_n_u8(p[1]));
    const uint8x16_t bit   = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    return vreinterpretq_s8_u8(vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(16)));
}

int8x64 load_fifth_bits(const uint8_t * a, const uint8_t * b) {
    return { { load_fifth_bits_16(a), load_fifth_bits_16(a + 2), load_fifth_bits_16(b), load_fifth_bits_16(b + 2) } };
}

template <int s, int t> int8x64 load_shifted(const void * p) {
    const int8x16_t a = load_128(p), b = load_128((const char *) p + 16);
    return { { shift_right<s>(a), shift_right<s>(b), shift_right<t>(a), shift_right<t>(b) } };
}

template <int mask> int8x64 or_high(int8x64 w, int8x64 h) {
    for (int i = 0; i < 4; i++) {
        w.val[i] = vorrq_s8(w.val[i], vshlq_n_s8(vandq_s8(h.val[i], vdupq_n_s8(mask)), 4));
    }
    return w;
}

int8x64 add_bits(int8x64 w, int8x64 bits) {
    for (int i = 0; i < 4; i++) {
        w.val[i] = vorrq_s8(w.val[i], bits.val[i]);
    }
    return w;
}

template <int c> int8x64 subtract(int8x64 w) {
    for (int i = 0; i < 4; i++) {
        w.val[i] = vsubq_s8(w.val[i], vdupq_n_s8(c));
    }
    return w;
}

int8x64 ones(void) {
    const int8x16_t one = vdupq_n_s8(1);
    return { { one, one, one, one } };
}

scale64 scale_f16(const uint8_t * a, const uint8_t * b) {
    const float sa = load_half(a), sb = load_half(b);
    return { { sa, sa, sb, sb } };
}

scale64 scale_set1(float f) {
    return { { f, f, f, f } };
}

scale64 scale_f32x2(const float * p) {
    return { { p[0], p[0], p[1], p[1] } };
}

scale64 scale_f32x4(const float * p) {
    return { { p[0], p[1], p[2], p[3] } };
}

scale64 scale_mul(scale64 a, scale64 b) {
    return { { a.s[0] * b.s[0], a.s[1] * b.s[1], a.s[2] * b.s[2], a.s[3] * b.s[3] } };
}

void store_scales_u8(float * dst, uint64_t bytes, float f) {
    const uint16x8_t wide = vmovl_u8(vcreate_u8(bytes));
    vst1q_f32(dst, vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), f));
    vst1q_f32(dst + 4, vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide))), f));
}

void store_scales_i8(float * dst, const int8_t * p, float f) {
    for (int i = 0; i < 16; i += 8) {
        const int16x8_t wide = vmovl_s8(vld1_s8(p + i));
        vst1q_f32(dst + i, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), f));
        vst1q_f32(dst + i + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide))), f));
    }
}

vec add_mins(vec acc, uint64_t mins, const float * sums, float f) {
    const uint16x8_t  wide = vmovl_u8(vcreate_u8(mins));
    const float32x4_t low  = vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
    const float32x4_t high = vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)));
    return vfmaq_n_f32(acc, vfmaq_f32(vmulq_f32(low, vld1q_f32(sums)), high, vld1q_f32(sums + 4)), f);
}

int8x64 load_pair_q4_0(const void * p, scale64 * s) {
    const block_q4_0 * b = (const block_q4_0 *) p;
    *s = scale_f16(b[0].d, b[1].d);
    return load_nibbles(b[0].q, b[1].q);
}

// Rounds to nearest, halves to even.
float quantise_32(const float * x, int8_t * q) {
    float32x4_t most = vdupq_n_f32(0.0f);
    for (int i = 0; i < 32; i += 4) {
        most = vmaxq_f32(most, vabsq_f32(vld1q_f32(x + i)));
    }
    const float largest = vmaxvq_f32(most);
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    for (int i = 0; i < 32; i += 8) {
        const int16x4_t a = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse)));
        const int16x4_t b = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse)));
        vst1_s8(q + i, vqmovn_s16(vcombine_s16(a, b)));
    }
    return largest / 127.0f;
}

int32x4_t dot_16(int8x16_t w, int8x16_t x) {
#    if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdupq_n_s32(0), w, x);
#    else
    // The sums of two products stay within 16 bits: at most 2 * 128 * 127.
    const int16x8_t products = vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vget_high_s8(w), vget_high_s8(x));
    return vpaddlq_s16(products);
#    endif
}

vec dot_signed(vec acc, int8x64 w, int8x64 x, scale64 s) {
    for (int i = 0; i < 4; i++) {
        acc = vfmaq_n_f32(acc, vcvtq_f32_s32(dot_16(w.val[i], x.val[i])), s.s[i]);
    }
    return acc;
}

vec dot_unsigned(vec acc, int8x64 w, int8x64 x, scale64 s) {
    return dot_signed(acc, w, x, s); // 0..63 are the same bytes
}

template <int c> vec dot_centred(vec acc, int8x64 w, int8x64 x, scale64 s) {
    return dot_signed(acc, subtract<c>(w), x, s);
}

struct floats16 {
    float32x4_t v[4];
};

floats16 widen(int8x16_t w) {
    const int16x8_t low = vmovl_s8(vget_low_s8(w)), high = vmovl_s8(vget_high_s8(w));
    return { { vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
               vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))) } };
}

void axpy_weights(float * y, int8x64 w, scale64 s) {
    for (int i = 0; i < 4; i++) {
        const floats16 wf = widen(w.val[i]);
        for (int j = 0; j < 4; j++) {
            float * p = y + 16 * i + 4 * j;
            vst1q_f32(p, vfmaq_n_f32(vld1q_f32(p), wf.v[j], s.s[i]));
        }
    }
}

void axpy_offset(float * y, int8x64 w, scale64 s, scale64 m) {
    for (int i = 0; i < 4; i++) {
        const floats16 wf = widen(w.val[i]);
        for (int j = 0; j < 4; j++) {
            float * p = y + 16 * i + 4 * j;
            vst1q_f32(p, vaddq_f32(vld1q_f32(p), vfmaq_n_f32(vdupq_n_f32(m.s[i]), wf.v[j], s.s[i])));
        }
    }
}

void axpy_16(float * y, int8x16_t w, float32x4_t s) {
    const floats16 wf = widen(w);
    for (int j = 0; j < 4; j++) {
        vst1q_f32(y + 4 * j, vfmaq_f32(vld1q_f32(y + 4 * j), wf.v[j], s));
    }
}

void axpy_bytes(float * y, const int8_t * p, vec s) {
    axpy_16(y, load_128(p), s);
    axpy_16(y + 16, load_128(p + 16), s);
}

struct nibble_map {
    float32x4_t s, m;
};

nibble_map map_nibbles(vec s, vec m) {
    return { s, m };
}

void axpy_nibbles_16(int8x16_t w, float * y, nibble_map f) {
    const floats16 wf = widen(w);
    for (int j = 0; j < 4; j++) {
        vst1q_f32(y + 4 * j, vaddq_f32(vld1q_f32(y + 4 * j), vfmaq_f32(f.m, wf.v[j], f.s)));
    }
}

void axpy_nibbles(const uint8_t * p, float * y, nibble_map f, float * z, nibble_map g) {
    const int8x16_t bytes = load_128(p);
    axpy_nibbles_16(low_nibbles(bytes), y, f);
    axpy_nibbles_16(shift_right<4>(bytes), z, g);
}

} // namespace

#    include "body.h"

const struct pinfer_kernel_table pinfer_kernels_neon = { "neon", kernels, sizeof(kernels) / sizeof(kernels[0]),
                                                         prepare_x_q8, nonzero, add_rows, {} };

#else

const struct pinfer_kernel_table pinfer_kernels_neon = { "neon", nullptr, 0, nullptr, nullptr, nullptr, {} };

#endif
