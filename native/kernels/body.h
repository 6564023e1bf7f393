// body.h: the kernels themselves, written once over the primitives that an instruction set's file defines before it
// includes this one. Everything is static, see blocks.h.
//
// An int8x64 holds 64 integer weights. A scale64 holds one float for each 16 of them, in the shape dot_* and axpy_* want.
//
//   vec, VEC_LANES                    float vector
//   vec_zero/load/load_f16/load_bf16/store/set1/add/fma(a, b, c) = a*b + c/sum
//   load_bytes(a, b)                  32 bytes at a, 32 bytes at b
//   load_nibbles(a, b)                for a, then b: low nibbles of 16 bytes, then their high nibbles
//   load_nibbles_k(p)                 low nibbles of 32 bytes, then their high nibbles
//   load_low/high_nibbles(p)          low / high nibbles of 64 bytes
//   load_fifth_bits(a, b)             bits of the 4 bytes at a, then at b: 16 where set, 0 where not
//   load_shifted<s, t>(p)             32 bytes >> s, then the same 32 bytes >> t (bits above the low 8 - shift: undefined)
//   or_high<mask>(w, h)               w | (h & mask) << 4
//   subtract<c>(w)                    w - c
//   ones()                            64 times 1
//   scale_f16(a, b)                   F16 at a for the first 32 weights, at b for the last 32
//   scale_set1(f), scale_f32x2(p), scale_f32x4(p), scale_mul(a, b)
//   dot_signed(acc, w, x, s)          acc + s * (w . x), lane by lane; w in -128..127, x in -127..127
//   dot_unsigned(acc, w, x, s)        the same for w in 0..63
//   axpy_weights(y, w, s)             y[0..63] += s * w
//   axpy_offset(y, w, s, m)           y[0..63] += s * w + m
#pragma once

namespace {

// Four partial sums hide the latency of the fused multiply-add; they are added in a fixed order.
template <vec (*load)(const void *), float (*load_one)(const void *), int size>
float dot_float(int64_t n, const void * row, const void * x) {
    const char *  w  = (const char *) row;
    const float * xf = (const float *) x;
    vec           s0 = vec_zero(), s1 = vec_zero(), s2 = vec_zero(), s3 = vec_zero();
    int64_t       i = 0;
    for (; i + 4 * VEC_LANES <= n; i += 4 * VEC_LANES) {
        s0 = vec_fma(load(w + size * i), vec_load(xf + i), s0);
        s1 = vec_fma(load(w + size * (i + VEC_LANES)), vec_load(xf + i + VEC_LANES), s1);
        s2 = vec_fma(load(w + size * (i + 2 * VEC_LANES)), vec_load(xf + i + 2 * VEC_LANES), s2);
        s3 = vec_fma(load(w + size * (i + 3 * VEC_LANES)), vec_load(xf + i + 3 * VEC_LANES), s3);
    }
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        s0 = vec_fma(load(w + size * i), vec_load(xf + i), s0);
    }
    float sum = vec_sum(vec_add(vec_add(s0, s1), vec_add(s2, s3)));
    for (; i < n; i++) {
        sum += load_one(w + size * i) * xf[i];
    }
    return sum;
}

template <vec (*load)(const void *), float (*load_one)(const void *), int size>
void axpy_float(int64_t n, float a, const void * row, float * y, float *) {
    const char * w  = (const char *) row;
    const vec    va = vec_set1(a);
    int64_t      i  = 0;
    for (; i + VEC_LANES <= n; i += VEC_LANES) {
        vec_store(y + i, vec_fma(va, load(w + size * i), vec_load(y + i)));
    }
    for (; i < n; i++) {
        y[i] += a * load_one(w + size * i);
    }
}

// ---- blocks of 32 weights, two at a time --------------------------------------------------------------------------------

int8x64 weights(const block_q8_0 * a, const block_q8_0 * b) {
    return load_bytes(a->q, b->q);
}

int8x64 weights(const block_q4_0 * a, const block_q4_0 * b) {
    return subtract<8>(load_nibbles(a->q, b->q));
}

int8x64 weights(const block_q4_1 * a, const block_q4_1 * b) {
    return load_nibbles(a->q, b->q);
}

int8x64 weights(const block_q5_0 * a, const block_q5_0 * b) {
    return subtract<16>(add_bits(load_nibbles(a->q, b->q), load_fifth_bits(a->qh, b->qh)));
}

int8x64 weights(const block_q5_1 * a, const block_q5_1 * b) {
    return add_bits(load_nibbles(a->q, b->q), load_fifth_bits(a->qh, b->qh));
}

// The partner of the last block of an odd number of them: scale 0.
const uint8_t zero_block[64] = {};

template <typename B, bool has_min>
void dot_pair(vec * acc, const B * a, const B * b, const block_q8_0 * xa, const block_q8_0 * xb) {
    const int8x64 w  = weights(a, b);
    const int8x64 x  = load_bytes(xa->q, xb->q);
    const scale64 sx = scale_f16(xa->d, xb->d);
    const scale64 s  = scale_mul(scale_f16(a->d, b->d), sx);
    if constexpr (has_min) {
        *acc = dot_unsigned(*acc, w, x, s);
        *acc = dot_unsigned(*acc, ones(), x, scale_mul(scale_f16(a->m, b->m), sx));
    } else {
        *acc = dot_signed(*acc, w, x, s);
    }
}

template <typename B, bool has_min> float dot_blocks(int64_t n, const void * row, const void * x) {
    const B *          w  = (const B *) row;
    const block_q8_0 * v  = (const block_q8_0 *) x;
    const int64_t      nb = n / 32;
    vec                s0 = vec_zero(), s1 = vec_zero();
    int64_t            i = 0;
    for (; i + 4 <= nb; i += 4) {
        dot_pair<B, has_min>(&s0, w + i, w + i + 1, v + i, v + i + 1);
        dot_pair<B, has_min>(&s1, w + i + 2, w + i + 3, v + i + 2, v + i + 3);
    }
    for (; i + 2 <= nb; i += 2) {
        dot_pair<B, has_min>(&s0, w + i, w + i + 1, v + i, v + i + 1);
    }
    if (i < nb) {
        dot_pair<B, has_min>(&s0, w + i, (const B *) zero_block, v + i, (const block_q8_0 *) zero_block);
    }
    return vec_sum(vec_add(s0, s1));
}

template <typename B, bool has_min> void axpy_pair(scale64 va, const B * a, const B * b, float * y) {
    const int8x64 w = weights(a, b);
    const scale64 s = scale_mul(va, scale_f16(a->d, b->d));
    if constexpr (has_min) {
        axpy_offset(y, w, s, scale_mul(va, scale_f16(a->m, b->m)));
    } else {
        axpy_weights(y, w, s);
    }
}

template <typename B, bool has_min> void axpy_blocks(int64_t n, float a, const void * row, float * y, float *) {
    const B *     w  = (const B *) row;
    const int64_t nb = n / 32;
    const scale64 va = scale_set1(a);
    int64_t       i  = 0;
    for (; i + 2 <= nb; i += 2) {
        axpy_pair<B, has_min>(va, w + i, w + i + 1, y + 32 * i);
    }
    if (i < nb) {
        float last[64] = {};
        memcpy(last, y + 32 * i, 32 * sizeof(float));
        axpy_pair<B, has_min>(va, w + i, (const B *) zero_block, last);
        memcpy(y + 32 * i, last, 32 * sizeof(float));
    }
}

// ---- blocks of 256 weights, in four parts of 64 --------------------------------------------------------------------------

template <int part> int8x64 weights(const block_q4_k * b) {
    return load_nibbles_k(b->q + 32 * part);
}

template <int part> int8x64 weights(const block_q5_k * b) {
    return or_high<1>(load_nibbles_k(b->q + 32 * part), load_shifted<2 * part, 2 * part + 1>(b->qh));
}

template <int part> int8x64 weights(const block_q6_k * b) {
    const uint8_t * ql  = b->ql + 64 * (part / 2);
    const int8x64   low = part % 2 ? load_high_nibbles(ql) : load_low_nibbles(ql);
    constexpr int   bit = part % 2 ? 4 : 0;
    return subtract<32>(or_high<3>(low, load_shifted<bit, bit + 2>(b->qh + 32 * (part / 2))));
}

// Scales of the whole block times f: one per 32 weights (Q4_K, Q5_K, which also have mins) or one per 16 (Q6_K).
struct scales_k {
    float scale[16];
    float min[8];
};

template <typename B> void load_scales(const B * b, float f, scales_k * s) {
    uint8_t scale[8], min[8];
    unpack_scales_k4(b->scales, scale, min);
    const float d = f * load_half(b->d), dmin = -f * load_half(b->dmin);
    for (int g = 0; g < 8; g++) {
        s->scale[g] = d * (float) scale[g];
        s->min[g]   = dmin * (float) min[g];
    }
}

void load_scales(const block_q6_k * b, float f, scales_k * s) {
    const float d = f * load_half(b->d);
    for (int g = 0; g < 16; g++) {
        s->scale[g] = d * (float) b->scales[g];
    }
}

template <typename B> constexpr bool has_min_k = true;
template <> constexpr bool           has_min_k<block_q6_k> = false;

template <typename B, int part> vec dot_part(vec acc, const B * b, const block_q8_k * x, const scales_k * s) {
    const int8x64 xq = load_bytes(x->q + 64 * part, x->q + 64 * part + 32);
    if constexpr (has_min_k<B>) {
        return dot_unsigned(acc, weights<part>(b), xq, scale_f32x2(s->scale + 2 * part));
    } else {
        return dot_signed(acc, weights<part>(b), xq, scale_f32x4(s->scale + 4 * part));
    }
}

template <typename B> float dot_k(int64_t n, const void * row, const void * x) {
    const B *          w   = (const B *) row;
    const block_q8_k * v   = (const block_q8_k *) x;
    vec                s0  = vec_zero(), s1 = vec_zero();
    float              off = 0.0f;
    for (int64_t i = 0; i < n / 256; i++) {
        scales_k s;
        load_scales(w + i, v[i].d, &s);
        s0 = dot_part<B, 0>(s0, w + i, v + i, &s);
        s1 = dot_part<B, 1>(s1, w + i, v + i, &s);
        s0 = dot_part<B, 2>(s0, w + i, v + i, &s);
        s1 = dot_part<B, 3>(s1, w + i, v + i, &s);
        if constexpr (has_min_k<B>) {
            for (int g = 0; g < 8; g++) {
                off += s.min[g] * (float) (v[i].sums[2 * g] + v[i].sums[2 * g + 1]);
            }
        }
    }
    return vec_sum(vec_add(s0, s1)) + off;
}

template <typename B, int part> void axpy_part(const B * b, const scales_k * s, float * y) {
    if constexpr (has_min_k<B>) {
        axpy_offset(y + 64 * part, weights<part>(b), scale_f32x2(s->scale + 2 * part), scale_f32x2(s->min + 2 * part));
    } else {
        axpy_weights(y + 64 * part, weights<part>(b), scale_f32x4(s->scale + 4 * part));
    }
}

template <typename B> void axpy_k(int64_t n, float a, const void * row, float * y, float *) {
    const B * w = (const B *) row;
    for (int64_t i = 0; i < n / 256; i++, y += 256) {
        scales_k s;
        load_scales(w + i, a, &s);
        axpy_part<B, 0>(w + i, &s, y);
        axpy_part<B, 1>(w + i, &s, y);
        axpy_part<B, 2>(w + i, &s, y);
        axpy_part<B, 3>(w + i, &s, y);
    }
}

vec load_vec_f32(const void * p) {
    return vec_load((const float *) p);
}

const struct pinfer_kernel kernels[] = {
    { GGML_TYPE_F32, GGML_TYPE_F32, dot_float<load_vec_f32, load_f32, 4>, axpy_float<load_vec_f32, load_f32, 4> },
    { GGML_TYPE_F16, GGML_TYPE_F32, dot_float<vec_load_f16, load_f16, 2>, axpy_float<vec_load_f16, load_f16, 2> },
    { GGML_TYPE_BF16, GGML_TYPE_F32, dot_float<vec_load_bf16, load_bf16, 2>, axpy_float<vec_load_bf16, load_bf16, 2> },
    { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, dot_blocks<block_q8_0, false>, axpy_blocks<block_q8_0, false> },
    { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, dot_blocks<block_q4_0, false>, axpy_blocks<block_q4_0, false> },
    { GGML_TYPE_Q4_1, GGML_TYPE_Q8_0, dot_blocks<block_q4_1, true>, axpy_blocks<block_q4_1, true> },
    { GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, dot_blocks<block_q5_0, false>, axpy_blocks<block_q5_0, false> },
    { GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, dot_blocks<block_q5_1, true>, axpy_blocks<block_q5_1, true> },
    { GGML_TYPE_Q4_K, GGML_TYPE_Q8_K, dot_k<block_q4_k>, axpy_k<block_q4_k> },
    { GGML_TYPE_Q5_K, GGML_TYPE_Q8_K, dot_k<block_q5_k>, axpy_k<block_q5_k> },
    { GGML_TYPE_Q6_K, GGML_TYPE_Q8_K, dot_k<block_q6_k>, axpy_k<block_q6_k> },
};

} // namespace
