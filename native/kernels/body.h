// body.h: the kernels themselves, written once over the primitives that an instruction set's file defines before it
// includes this one. Everything is static, see blocks.h.
//
// An int8x64 holds 64 integer weights. A scale64 holds one float for each 16 of them, in the shape dot_* and axpy_*
// want.
//
//   vec, VEC_LANES                    float vector
//   vec_zero/load/load_f16/load_bf16/load_i8/store/set1/set1_f16/add/mul/fma(a, b, c) = a*b + c/sum
//   load_bytes(a, b), load_bytes(p)   32 bytes at a, 32 bytes at b; 64 bytes at p
//   load_nibbles(a, b)                for a, then b: low nibbles of 16 bytes, then their high nibbles
//   load_nibbles_k(p)                 low nibbles of 32 bytes, then their high nibbles
//   load_low/high_nibbles(p)          low / high nibbles of 64 bytes
//   load_fifth_bits(a, b)             bits of the 4 bytes at a, then at b: 16 where set, 0 where not
//   load_shifted<s, t>(p)             32 bytes >> s, then the same 32 bytes >> t (high bits: undefined)
//   or_high<mask>(w, h)               w | (h & mask) << 4
//   subtract<c>(w)                    w - c
//   ones()                            64 times 1
//   scale_f16(a, b)                   F16 at a for the first 32 weights, at b for the last 32
//   load_pair_q4_0(p, s)              load_nibbles of two blocks at p that lie side by side, and *s = their scales
//   quantise_32(x, q)                 q[i] = x[i] / d, rounded, for the d = largest |x| / 127 that is returned
//   scale_set1(f), scale_f32x2(p), scale_f32x4(p), scale_mul(a, b)
//   store_scales_u8(dst, bytes, f)    dst[0..7] = f * each of 8 unsigned bytes
//   store_scales_i8(dst, p, f)        dst[0..15] = f * each of 16 signed bytes
//   add_mins(acc, mins, sums, f)      acc + f * (each of 8 mins times its sum), on any lanes
//   dot_lanes(acc, w, s, x, lanes)    acc + s * d * ((w - 8) . x) with d of the lanes (PINFER_HAS_DOT_LANES)
//   dot_signed(acc, w, x, s)          acc + s * (w . x), lane by lane; w in -128..127, x in -127..127
//   dot_unsigned(acc, w, x, s)        the same for w in 0..63
//   dot_centred<c>(acc, w, x, s)      acc + s * ((w - c) . x) for w in 0..63, c in 1..32
//   axpy_weights(y, w, s)             y[0..63] += s * w
//   axpy_offset(y, w, s, m)           y[0..63] += s * w + m
//   axpy_bytes(y, p, s)               y[0..31] += s * (32 signed bytes at p), s a vec of equal lanes
//   nibble_map, map_nibbles(s, m)     the function s * nibble + m, s and m vecs of equal lanes
//   axpy_nibbles(p, y, f, z, g)       y[0..15] += f(low nibble), z[0..15] += g(high nibble) of 16 bytes at p
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

// ---- blocks of 32 weights, two at a time ----------------------------------------------------------------------

int8x64 weights(const block_q8_0 * a, const block_q8_0 * b) {
    return load_bytes(a->q, b->q);
}

int8x64 weights(const block_q4_0 * a, const block_q4_0 * b) {
    return load_nibbles(a->q, b->q);
}

int8x64 weights(const block_q4_1 * a, const block_q4_1 * b) {
    return load_nibbles(a->q, b->q);
}

int8x64 weights(const block_q5_0 * a, const block_q5_0 * b) {
    return add_bits(load_nibbles(a->q, b->q), load_fifth_bits(a->qh, b->qh));
}

int8x64 weights(const block_q5_1 * a, const block_q5_1 * b) {
    return add_bits(load_nibbles(a->q, b->q), load_fifth_bits(a->qh, b->qh));
}

// What is taken off the unsigned integers of a type: weight = d * (q - centre).
template <typename B> constexpr int centre     = 0;
template <> constexpr int           centre<block_q4_0> = 8;
template <> constexpr int           centre<block_q5_0> = 16;
template <> constexpr int           centre<block_q6_k> = 32;

// The partner of the last block of an odd number of them: scale 0.
const uint8_t zero_block[64] = {};

template <typename B> int8x64 weights_and_scale(const B * a, const B * b, scale64 * s) {
    *s = scale_f16(a->d, b->d);
    return weights(a, b);
}

// w . x of blocks a and b, which meet x->q[64 * i ...]
template <typename B, bool has_min>
vec dot_pair(vec acc, int8x64 w, scale64 s, const B * a, const B * b, const pinfer_x_q8 * x, int64_t i) {
    const int8x64 xq = load_bytes(x->q + 64 * i);
    const scale64 sx = scale_f32x2(x->d + 2 * i);
    const scale64 ss = scale_mul(s, sx);
    if constexpr (has_min) {
        acc = dot_unsigned(acc, w, xq, ss);
        return dot_unsigned(acc, ones(), xq, scale_mul(scale_f16(a->m, b->m), sx));
    } else if constexpr (centre<B> > 0) {
        return dot_centred<centre<B>>(acc, w, xq, ss);
    } else {
        return dot_signed(acc, w, xq, ss);
    }
}

template <typename B, bool has_min> vec dot_neighbours(vec acc, const B * w, const pinfer_x_q8 * x, int64_t i) {
    scale64       s;
    const int8x64 q = weights_and_scale(w + 2 * i, w + 2 * i + 1, &s);
    return dot_pair<B, has_min>(acc, q, s, w + 2 * i, w + 2 * i + 1, x, i);
}

template <> vec dot_neighbours<block_q4_0, false>(vec acc, const block_q4_0 * w, const pinfer_x_q8 * x, int64_t i) {
    scale64       s;
    const int8x64 q = load_pair_q4_0(w + 2 * i, &s);
#ifdef PINFER_HAS_DOT_LANES
    return dot_lanes(acc, q, s, x->q + 64 * i, x->lanes + i);
#else
    return dot_pair<block_q4_0, false>(acc, q, s, w + 2 * i, w + 2 * i + 1, x, i);
#endif
}

template <typename B, bool has_min> float dot_blocks(int64_t n, const void * row, const void * x) {
    const B *         w = (const B *) row;
    const pinfer_x_q8 v = x_q8_at(x, n);
    vec               s0 = vec_zero(), s1 = vec_zero();
    int64_t           i = 0;
    for (; i + 2 <= n / 64; i += 2) {
        s0 = dot_neighbours<B, has_min>(s0, w, &v, i);
        s1 = dot_neighbours<B, has_min>(s1, w, &v, i + 1);
    }
    if (i < n / 64) {
        s0 = dot_neighbours<B, has_min>(s0, w, &v, i);
    }
    if (n % 64) {
        const B * const a = w + n / 32 - 1, * const b = (const B *) zero_block;
        scale64         s;
        const int8x64   q = weights_and_scale(a, b, &s);
        s0                = dot_pair<B, has_min>(s0, q, s, a, b, &v, n / 64);
    }
    return vec_sum(vec_add(s0, s1));
}

template <typename B, bool has_min> void axpy_pair(scale64 va, const B * a, const B * b, float * y) {
    const int8x64 w = weights(a, b);
    const scale64 s = scale_mul(va, scale_f16(a->d, b->d));
    if constexpr (has_min) {
        axpy_offset(y, w, s, scale_mul(va, scale_f16(a->m, b->m)));
    } else {
        axpy_weights(y, subtract<centre<B>>(w), s);
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

void axpy_q8_0(int64_t n, float a, const void * row, float * y, float *) {
    const vec va = vec_set1(a);
    for (const block_q8_0 * b = (const block_q8_0 *) row; n >= 32; n -= 32, b++, y += 32) {
        axpy_bytes(y, b->q, vec_mul(va, vec_set1_f16(b->d)));
    }
}

void axpy_q4_0(int64_t n, float a, const void * row, float * y, float *) {
    const vec va = vec_set1(a), offset = vec_set1((float) -centre<block_q4_0>);
    for (const block_q4_0 * b = (const block_q4_0 *) row; n >= 32; n -= 32, b++, y += 32) {
        const vec        s   = vec_mul(va, vec_set1_f16(b->d));
        const nibble_map map = map_nibbles(s, vec_mul(s, offset));
        axpy_nibbles(b->q, y, map, y + 16, map);
    }
}

void axpy_q4_1(int64_t n, float a, const void * row, float * y, float *) {
    const vec va = vec_set1(a);
    for (const block_q4_1 * b = (const block_q4_1 *) row; n >= 32; n -= 32, b++, y += 32) {
        const nibble_map map = map_nibbles(vec_mul(va, vec_set1_f16(b->d)), vec_mul(va, vec_set1_f16(b->m)));
        axpy_nibbles(b->q, y, map, y + 16, map);
    }
}

// ---- blocks of 256 weights, in four parts of 64 ---------------------------------------------------------------

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
    return or_high<3>(low, load_shifted<bit, bit + 2>(b->qh + 32 * (part / 2)));
}

// Scales and offsets of the 8 groups of a Q4_K or Q5_K block, times f.
struct scales_k {
    float scale[8];
    float min[8];
};

template <typename B> void load_scales(const B * b, const scales_k4 * packed, float f, scales_k * s) {
    store_scales_u8(s->scale, packed->scale, f * load_half(b->d));
    store_scales_u8(s->min, packed->min, -f * load_half(b->dmin));
}

// Part `part` of block b meets x->q[64 * i ...]; scale: of each 32 weights.
template <typename B, int part>
vec dot_part_k4(vec acc, const B * b, const float * scale, const pinfer_x_q8 * x, int64_t i) {
    const scale64 s = scale_mul(scale_f32x2(scale + 2 * part), scale_f32x2(x->d + 2 * i));
    return dot_unsigned(acc, weights<part>(b), load_bytes(x->q + 64 * i), s);
}

template <typename B> float dot_k4(int64_t n, const void * row, const void * x) {
    const B *         w = (const B *) row;
    const pinfer_x_q8 v = x_q8_at(x, n);
    vec               s0 = vec_zero(), s1 = vec_zero(), offsets = vec_zero();
    for (int64_t i = 0; i < n / 64; i += 4, w++) {
        const scales_k4 packed = unpack_scales_k4(w->scales);
        float           scale[8];
        store_scales_u8(scale, packed.scale, load_half(w->d));
        s0      = dot_part_k4<B, 0>(s0, w, scale, &v, i);
        s1      = dot_part_k4<B, 1>(s1, w, scale, &v, i + 1);
        s0      = dot_part_k4<B, 2>(s0, w, scale, &v, i + 2);
        s1      = dot_part_k4<B, 3>(s1, w, scale, &v, i + 3);
        offsets = add_mins(offsets, packed.min, v.s32 + 2 * i, -load_half(w->dmin));
    }
    return vec_sum(vec_add(vec_add(s0, s1), offsets));
}

// scale: of each 16 weights.
template <int part>
vec dot_part_q6_k(vec acc, const block_q6_k * b, const float * scale, const pinfer_x_q8 * x, int64_t i) {
    const scale64 s = scale_mul(scale_f32x4(scale + 4 * part), scale_f32x2(x->d + 2 * i));
    return dot_centred<centre<block_q6_k>>(acc, weights<part>(b), load_bytes(x->q + 64 * i), s);
}

float dot_q6_k(int64_t n, const void * row, const void * x) {
    const block_q6_k * w = (const block_q6_k *) row;
    const pinfer_x_q8  v = x_q8_at(x, n);
    vec                s0 = vec_zero(), s1 = vec_zero();
    for (int64_t i = 0; i < n / 64; i += 4, w++) {
        float scale[16];
        store_scales_i8(scale, w->scales, load_half(w->d));
        s0 = dot_part_q6_k<0>(s0, w, scale, &v, i);
        s1 = dot_part_q6_k<1>(s1, w, scale, &v, i + 1);
        s0 = dot_part_q6_k<2>(s0, w, scale, &v, i + 2);
        s1 = dot_part_q6_k<3>(s1, w, scale, &v, i + 3);
    }
    return vec_sum(vec_add(s0, s1));
}

void axpy_q4_k(int64_t n, float a, const void * row, float * y, float *) {
    for (const block_q4_k * b = (const block_q4_k *) row; n >= 256; n -= 256, b++) {
        const scales_k4 packed = unpack_scales_k4(b->scales);
        scales_k        s;
        load_scales(b, &packed, a, &s);
        for (int part = 0; part < 4; part++, y += 64) {
            const float *    scale = s.scale + 2 * part, *min = s.min + 2 * part;
            const nibble_map low   = map_nibbles(vec_set1(scale[0]), vec_set1(min[0]));
            const nibble_map high  = map_nibbles(vec_set1(scale[1]), vec_set1(min[1]));
            axpy_nibbles(b->q + 32 * part, y, low, y + 32, high);
            axpy_nibbles(b->q + 32 * part + 16, y + 16, low, y + 48, high);
        }
    }
}

template <int part> void axpy_part_q5_k(const block_q5_k * b, const scales_k * s, float * y) {
    axpy_offset(y + 64 * part, weights<part>(b), scale_f32x2(s->scale + 2 * part), scale_f32x2(s->min + 2 * part));
}

void axpy_q5_k(int64_t n, float a, const void * row, float * y, float *) {
    for (const block_q5_k * b = (const block_q5_k *) row; n >= 256; n -= 256, b++, y += 256) {
        const scales_k4 packed = unpack_scales_k4(b->scales);
        scales_k        s;
        load_scales(b, &packed, a, &s);
        axpy_part_q5_k<0>(b, &s, y);
        axpy_part_q5_k<1>(b, &s, y);
        axpy_part_q5_k<2>(b, &s, y);
        axpy_part_q5_k<3>(b, &s, y);
    }
}

template <int part> void axpy_part_q6_k(const block_q6_k * b, const float * scale, float * y) {
    axpy_weights(y + 64 * part, subtract<centre<block_q6_k>>(weights<part>(b)), scale_f32x4(scale + 4 * part));
}

void axpy_q6_k(int64_t n, float a, const void * row, float * y, float *) {
    for (const block_q6_k * b = (const block_q6_k *) row; n >= 256; n -= 256, b++, y += 256) {
        float scale[16];
        store_scales_i8(scale, b->scales, a * load_half(b->d));
        axpy_part_q6_k<0>(b, scale, y);
        axpy_part_q6_k<1>(b, scale, y);
        axpy_part_q6_k<2>(b, scale, y);
        axpy_part_q6_k<3>(b, scale, y);
    }
}

// ---- several tokens at once ------------------------------------------------------------------------------------

vec load_vec_f32(const void * p) {
    return vec_load((const float *) p);
}

// A piece of the row is converted once for T tokens.
template <int T, vec (*load)(const void *), float (*load_one)(const void *), int size>
void dot_float_tokens(int64_t n, const void * row, const char * x, size_t x_row, float * out) {
    const char *  w = (const char *) row;
    const float * xf[T];
    vec           sum[T][2];
    for (int t = 0; t < T; t++) {
        xf[t]     = (const float *) (x + (size_t) t * x_row);
        sum[t][0] = sum[t][1] = vec_zero();
    }
    int64_t i = 0;
    for (; i + 2 * VEC_LANES <= n; i += 2 * VEC_LANES) {
        const vec a = load(w + size * i), b = load(w + size * (i + VEC_LANES));
        for (int t = 0; t < T; t++) {
            sum[t][0] = vec_fma(a, vec_load(xf[t] + i), sum[t][0]);
            sum[t][1] = vec_fma(b, vec_load(xf[t] + i + VEC_LANES), sum[t][1]);
        }
    }
    for (int t = 0; t < T; t++) {
        float rest = 0.0f;
        for (int64_t k = i; k < n; k++) {
            rest += load_one(w + size * k) * xf[t][k];
        }
        out[t] = vec_sum(vec_add(sum[t][0], sum[t][1])) + rest;
    }
}

template <vec (*load)(const void *), float (*load_one)(const void *), int size>
void dot_many_float(int64_t n, const void * row, const void * x, size_t x_row, int64_t n_tokens, float * out) {
    const char * v = (const char *) x;
    for (; n_tokens >= 4; n_tokens -= 4, v += 4 * x_row, out += 4) {
        dot_float_tokens<4, load, load_one, size>(n, row, v, x_row, out);
    }
    if (n_tokens == 3) {
        dot_float_tokens<3, load, load_one, size>(n, row, v, x_row, out);
    } else if (n_tokens == 2) {
        dot_float_tokens<2, load, load_one, size>(n, row, v, x_row, out);
    } else if (n_tokens == 1) {
        dot_float_tokens<1, load, load_one, size>(n, row, v, x_row, out);
    }
}

// How accumulate reads PIECE columns of a row, as PIECE / VEC_LANES vectors.
constexpr int PIECE   = 32;
constexpr int PER_VEC = PIECE / VEC_LANES;

template <vec (*load)(const void *), int size> struct float_piece {
    static void read(const void * row, int64_t at, vec * w) {
        for (int k = 0; k < PER_VEC; k++) {
            w[k] = load((const char *) row + size * (at + k * VEC_LANES));
        }
    }
};

struct q8_0_piece {
    static void read(const void * row, int64_t at, vec * w) {
        const block_q8_0 * b = (const block_q8_0 *) row + at / 32;
        const vec          s = vec_set1_f16(b->d);
        for (int k = 0; k < PER_VEC; k++) {
            w[k] = vec_mul(s, vec_load_i8(b->q + k * VEC_LANES));
        }
    }
};

// The sums of a piece stay in registers while the rows go by.
template <int T, typename R>
void accumulate_piece(int64_t at, int64_t n_rows, const void * const * rows, const float * a, int64_t a_row, int64_t n,
                      float * y) {
    vec sum[T][PER_VEC];
    for (int t = 0; t < T; t++) {
        for (int k = 0; k < PER_VEC; k++) {
            sum[t][k] = vec_load(y + t * n + at + k * VEC_LANES);
        }
    }
    for (int64_t r = 0; r < n_rows; r++) {
        vec w[PER_VEC];
        R::read(rows[r], at, w);
        for (int t = 0; t < T; t++) {
            const vec f = vec_set1(a[r * a_row + t]);
            for (int k = 0; k < PER_VEC; k++) {
                sum[t][k] = vec_fma(f, w[k], sum[t][k]);
            }
        }
    }
    for (int t = 0; t < T; t++) {
        for (int k = 0; k < PER_VEC; k++) {
            vec_store(y + t * n + at + k * VEC_LANES, sum[t][k]);
        }
    }
}

// Columns that fill no piece (float rows only).
template <float (*load_one)(const void *), int size>
void accumulate_rest(int64_t n, int64_t n_rows, const void * const * rows, const float * a, int64_t n_tokens,
                     float * y) {
    for (int64_t at = n / PIECE * PIECE; at < n; at++) {
        for (int64_t r = 0; r < n_rows; r++) {
            const float w = load_one((const char *) rows[r] + size * at);
            for (int64_t t = 0; t < n_tokens; t++) {
                y[t * n + at] += a[r * n_tokens + t] * w;
            }
        }
    }
}

// Few tokens: all of them at once, zeros too.
template <typename R>
void accumulate_few(int64_t n, int64_t n_rows, const void * const * rows, const float * a, int64_t n_tokens,
                    float * y) {
    for (int64_t at = 0; at + PIECE <= n; at += PIECE) {
        if (n_tokens == 4) {
            accumulate_piece<4, R>(at, n_rows, rows, a, n_tokens, n, y);
        } else if (n_tokens == 3) {
            accumulate_piece<3, R>(at, n_rows, rows, a, n_tokens, n, y);
        } else if (n_tokens == 2) {
            accumulate_piece<2, R>(at, n_rows, rows, a, n_tokens, n, y);
        } else {
            accumulate_piece<1, R>(at, n_rows, rows, a, n_tokens, n, y);
        }
    }
}

// Columns of y that many tokens are summed into before the next columns' turn: they stay in the first-level cache.
constexpr int64_t SPAN = 256;

// Most tokens that accumulate_many takes at once.
constexpr int64_t MANY = 128;

// y[at ... at + width) of the tokens in `list` += a row of weights, times the token's factor.
void add_span(const float * w, int64_t width, const float * a, const uint8_t * list, int64_t n_list, int64_t n,
              float * y) {
    for (int64_t k = 0; k < n_list; k++) {
        float * const to = y + list[k] * n;
        const vec     f  = vec_set1(a[list[k]]);
        for (int64_t i = 0; i < width; i += VEC_LANES) {
            vec_store(to + i, vec_fma(f, vec_load(w + i), vec_load(to + i)));
        }
    }
}

// Many tokens: a piece of a row is unpacked once, and added where it is not multiplied by zero.
template <typename R>
void accumulate_many(int64_t n, int64_t n_rows, const void * const * rows, const float * a, int64_t a_row,
                     int64_t n_tokens, float * y) {
    uint8_t list[PINFER_TILE_ROWS][MANY];
    int64_t n_list[PINFER_TILE_ROWS] = {};
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t t = 0; t < n_tokens; t++) {
            list[r][n_list[r]] = (uint8_t) t;
            n_list[r] += a[r * a_row + t] != 0.0f;
        }
    }
    for (int64_t at = 0; at + PIECE <= n; at += SPAN) {
        const int64_t width = (n - at < SPAN ? n - at : SPAN) / PIECE * PIECE;
        for (int64_t r = 0; r < n_rows; r++) {
            float w[SPAN];
            for (int64_t i = 0; n_list[r] > 0 && i < width; i += PIECE) {
                vec v[PER_VEC];
                R::read(rows[r], at + i, v);
                for (int k = 0; k < PER_VEC; k++) {
                    vec_store(w + i + k * VEC_LANES, v[k]);
                }
            }
            add_span(w, width, a + r * a_row, list[r], n_list[r], n, y + at);
        }
    }
}

template <typename R>
void accumulate_pieces(int64_t n, int64_t n_rows, const void * const * rows, const float * a, int64_t n_tokens,
                       float * y) {
    if (n_tokens <= 4) {
        accumulate_few<R>(n, n_rows, rows, a, n_tokens, y);
        return;
    }
    for (int64_t r = 0; r < n_rows; r += PINFER_TILE_ROWS) {
        const int64_t part = n_rows - r < PINFER_TILE_ROWS ? n_rows - r : PINFER_TILE_ROWS;
        for (int64_t t = 0; t < n_tokens; t += MANY) {
            const int64_t tokens = n_tokens - t < MANY ? n_tokens - t : MANY;
            accumulate_many<R>(n, part, rows + r, a + r * n_tokens + t, n_tokens, tokens, y + t * n);
        }
    }
}

template <vec (*load)(const void *), float (*load_one)(const void *), int size>
void accumulate_float(int64_t n, int64_t n_rows, const void * const * rows, const float * a, int64_t n_tokens,
                      float * y) {
    accumulate_pieces<float_piece<load, size>>(n, n_rows, rows, a, n_tokens, y);
    accumulate_rest<load_one, size>(n, n_rows, rows, a, n_tokens, y);
}

// ---- many tokens, each with its own rows ------------------------------------------------------------------------

void nonzero(int64_t n, const float * a, uint64_t * bits) {
    for (; n > 0; n -= 64, a += 64, bits++) {
        const int64_t n_bits = n < 64 ? n : 64;
        uint64_t      word   = 0;
        int64_t       i      = 0;
        for (; i + VEC_LANES <= n_bits; i += VEC_LANES) {
            word |= (uint64_t) vec_nonzero(vec_load(a + i)) << i;
        }
        for (; i < n_bits; i++) {
            word |= (uint64_t) (a[i] != 0.0f) << i;
        }
        *bits = word;
    }
}

// N vectors of columns: the sums of a token stay in registers while its rows go by.
template <int N>
void add_rows_columns(int64_t n, const float * w, const uint64_t * rows, const float * const * a, int64_t n_tokens, float * y,
                      int64_t y_row) {
    for (int64_t t = 0; t < n_tokens; t++, y += y_row) {
        uint64_t left = rows[t];
        if (left == 0) {
            continue;
        }
        const float * factor = a[t];
        vec           sum[N];
        for (int k = 0; k < N; k++) {
            sum[k] = vec_load(y + k * VEC_LANES);
        }
        for (; left != 0; left &= left - 1) {
            const vec           f   = vec_set1(*factor++);
            const float * const row = w + __builtin_ctzll(left) * n;
            for (int k = 0; k < N; k++) {
                sum[k] = vec_fma(f, vec_load(row + k * VEC_LANES), sum[k]);
            }
        }
        for (int k = 0; k < N; k++) {
            vec_store(y + k * VEC_LANES, sum[k]);
        }
    }
}

// 64 columns at a time, since so many of PINFER_SUM_ROWS rows fit the first-level cache.
void add_rows(int64_t n, const float * w, const uint64_t * rows, const float * const * a, int64_t n_tokens, float * y,
              int64_t y_row) {
    constexpr int N  = 64 / VEC_LANES;
    int64_t       at = 0;
    for (; at + N * VEC_LANES <= n; at += N * VEC_LANES) {
        add_rows_columns<N>(n, w + at, rows, a, n_tokens, y + at, y_row);
    }
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        add_rows_columns<1>(n, w + at, rows, a, n_tokens, y + at, y_row);
    }
    for (int64_t t = 0; at < n && t < n_tokens; t++) {
        const float * factor = a[t];
        for (uint64_t left = rows[t]; left != 0; left &= left - 1, factor++) {
            const float * const row = w + __builtin_ctzll(left) * n;
            for (int64_t j = at; j < n; j++) {
                y[t * y_row + j] += *factor * row[j];
            }
        }
    }
}

// ---- x ---------------------------------------------------------------------------------------------------------

void prepare_x_q8(const float * x, void * dst, int64_t n) {
    const pinfer_x_q8 v = x_q8_at(dst, n);
    memset(v.q + n, 0, x_q8_padded(n) - (size_t) n);
    for (int64_t i = 0; i < n / 32; i++) {
        v.d[i] = quantise_32(x + 32 * i, v.q + 32 * i);
        int sum[2] = {0, 0};
        for (int k = 0; k < 16; k++) {
            sum[0] += v.q[32 * i + k];
            sum[1] += v.q[32 * i + 16 + k];
        }
        v.s16[2 * i]     = v.d[i] * (float) sum[0];
        v.s16[2 * i + 1] = v.d[i] * (float) sum[1];
        v.s32[i]         = v.d[i] * (float) (sum[0] + sum[1]);
    }
    x_q8_fill_lanes(&v, n);
}

} // namespace

#ifdef PINFER_HAS_TILES
#    include "tiles.h"
#    define TILES(B) tile_pack<B>, tile_multiply<B>, nullptr, nullptr
#    define BOTH_TILES(B) tile_pack<B>, tile_multiply<B>, tile_pack_small<B>, tile_multiply_small<B>
#else
#    define TILES(B) nullptr, nullptr, nullptr, nullptr
#    define BOTH_TILES TILES
#endif

namespace {

#define FLOATS(load, load_one, size)                                                                  \
    GGML_TYPE_F32, dot_float<load, load_one, size>, axpy_float<load, load_one, size>,                 \
        accumulate_float<load, load_one, size>, dot_many_float<load, load_one, size>, nullptr, nullptr, \
        nullptr, nullptr

const struct pinfer_kernel kernels[] = {
    { GGML_TYPE_F32, FLOATS(load_vec_f32, load_f32, 4) },
    { GGML_TYPE_F16, FLOATS(vec_load_f16, load_f16, 2) },
    { GGML_TYPE_BF16, FLOATS(vec_load_bf16, load_bf16, 2) },
    { GGML_TYPE_Q8_0, PINFER_X_Q8, dot_blocks<block_q8_0, false>, axpy_q8_0, accumulate_pieces<q8_0_piece>, nullptr,
      BOTH_TILES(block_q8_0) },
    { GGML_TYPE_Q4_0, PINFER_X_Q8, dot_blocks<block_q4_0, false>, axpy_q4_0, nullptr, nullptr,
      BOTH_TILES(block_q4_0) },
    { GGML_TYPE_Q4_1, PINFER_X_Q8, dot_blocks<block_q4_1, true>, axpy_q4_1, nullptr, nullptr,
      TILES(block_q4_1) },
    { GGML_TYPE_Q5_0, PINFER_X_Q8, dot_blocks<block_q5_0, false>, axpy_blocks<block_q5_0, false>, nullptr, nullptr,
      TILES(block_q5_0) },
    { GGML_TYPE_Q5_1, PINFER_X_Q8, dot_blocks<block_q5_1, true>, axpy_blocks<block_q5_1, true>, nullptr, nullptr,
      TILES(block_q5_1) },
    { GGML_TYPE_Q4_K, PINFER_X_Q8, dot_k4<block_q4_k>, axpy_q4_k, nullptr, nullptr, TILES(block_q4_k) },
    { GGML_TYPE_Q5_K, PINFER_X_Q8, dot_k4<block_q5_k>, axpy_q5_k, nullptr, nullptr, TILES(block_q5_k) },
    { GGML_TYPE_Q6_K, PINFER_X_Q8, dot_q6_k, axpy_q6_k, nullptr, nullptr, TILES(block_q6_k) },
};

} // namespace
