// blocks.h: the byte layouts of ggml's quantised blocks that have kernels here, as documented for GGUF files.
//
// Scales are byte arrays, so that a block may lie at any address. Every function is static: this header is compiled
// into files with different instruction set flags, and nothing of it may be shared between them by the linker.
#pragma once

#include "kernels.h"

#include <stdint.h>
#include <string.h>

// 32 weights, weight = d * q. q is 8 bits; 4 bits minus 8 (low nibbles first half, high nibbles second half); 5 bits
// minus 16 (the fifth bit of weight i is bit i of qh).
struct block_q8_0 {
    uint8_t d[2]; // F16
    int8_t  q[32];
};

struct block_q4_0 {
    uint8_t d[2];
    uint8_t q[16];
};

struct block_q5_0 {
    uint8_t d[2];
    uint8_t qh[4];
    uint8_t q[16];
};

// 32 weights, weight = d * q + m, q unsigned.
struct block_q4_1 {
    uint8_t d[2];
    uint8_t m[2];
    uint8_t q[16];
};

struct block_q5_1 {
    uint8_t d[2];
    uint8_t m[2];
    uint8_t qh[4];
    uint8_t q[16];
};

// 256 weights in 8 groups of 32, weight = d * scale[group] * q - dmin * min[group]; scales and mins are packed to 6
// bits. Byte 32*j + i of q holds weight i of group 2j (low nibble) and of group 2j+1 (high nibble).
struct block_q4_k {
    uint8_t d[2];
    uint8_t dmin[2];
    uint8_t scales[12];
    uint8_t q[128];
};

struct block_q5_k {
    uint8_t d[2];
    uint8_t dmin[2];
    uint8_t scales[12];
    uint8_t qh[32]; // bit g of byte i: fifth bit of weight i of group g
    uint8_t q[128];
};

// 256 weights in 16 groups of 16, weight = d * scale[group] * (q - 32), q of 6 bits. Each half of 128 weights takes
// 64 bytes of ql (low nibbles: weights 0-63, high nibbles: 64-127) and 32 of qh (two bits each for weights i, i+32,
// i+64, i+96).
struct block_q6_k {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t  scales[16];
    uint8_t d[2];
};

// One tile: 32 columns of PINFER_TILE_ROWS rows as unsigned bytes, four columns of a row side by side, and two floats a
// row: scale and offset, or the scales of the first and the last 16 columns.
struct alignas(64) tile_group {
    uint8_t q[8][PINFER_TILE_ROWS][4];
    float   a[PINFER_TILE_ROWS];
    float   b[PINFER_TILE_ROWS];
};

// The same as small as the rows. Of Q4_0, column c of the first four has the low nibbles, c + 4 the high ones.
struct tile_group_4 {
    uint8_t q[4][PINFER_TILE_ROWS][4];
    uint8_t a[PINFER_TILE_ROWS][2]; // F16
};

struct tile_group_8 {
    uint8_t q[8][PINFER_TILE_ROWS][4];
    uint8_t a[PINFER_TILE_ROWS][2]; // F16
};

// Whole numbers of 1 or 2 bits without scales (predictors): column c lies at bits c / bits * bits of q[c % bits].
template <int bits> struct tile_group_bits {
    uint8_t q[bits][PINFER_TILE_ROWS][4];
};

// 64 values of x as 16 lanes of four meet them in a dot product with Q4_0: their scales, and what the 8 that is taken off each
// weight makes of them.
struct x_q8_lanes {
    float   d[16];
    int32_t start[16]; // -8 times the sum of the four
};

// x of n values (PINFER_X_Q8): value j = d[j / 32] * q[j]; s32 and s16 are the sums of 32 and of 16 such values.
struct pinfer_x_q8 {
    int8_t * q; // padded with zeros to a multiple of 64
    float *  d;
    float *  s32;
    float *  s16;

    x_q8_lanes * lanes; // of each 64 values
};

static inline size_t x_q8_padded(int64_t n) {
    return ((size_t) n + 63) / 64 * 64;
}

static inline size_t x_q8_lanes_at(int64_t n) {
    return x_q8_padded((int64_t) (x_q8_padded(n) + (size_t) n / 2));
}

static inline size_t x_q8_size(int64_t n) {
    return x_q8_lanes_at(n) + x_q8_padded(n) / 64 * sizeof(x_q8_lanes);
}

static inline pinfer_x_q8 x_q8_at(const void * x, int64_t n) {
    int8_t * const q = (int8_t *) x;
    float * const  d = (float *) (q + x_q8_padded(n));
    return { q, d, d + n / 32, d + n / 16, (x_q8_lanes *) (q + x_q8_lanes_at(n)) };
}

// The lanes, from q and d.
static inline void x_q8_fill_lanes(const pinfer_x_q8 * x, int64_t n) {
    for (int64_t i = 0; i < n / 64; i++) {
        for (int64_t k = 0; k < 16; k++) {
            const int8_t * q      = x->q + 64 * i + 4 * k;
            x->lanes[i].d[k]      = x->d[2 * i + k / 8];
            x->lanes[i].start[k]  = -8 * (q[0] + q[1] + q[2] + q[3]);
        }
    }
}

static_assert(sizeof(block_q8_0) == 34 && sizeof(block_q4_0) == 18 && sizeof(block_q5_0) == 22, "ggml block sizes");
static_assert(sizeof(block_q4_1) == 20 && sizeof(block_q5_1) == 24, "ggml block sizes");
static_assert(sizeof(block_q4_k) == 144 && sizeof(block_q5_k) == 176 && sizeof(block_q6_k) == 210, "ggml block sizes");
static_assert(sizeof(tile_group) == 640 && sizeof(tile_group_4) == 288 && sizeof(tile_group_8) == 544, "no padding");

static inline uint16_t load_u16(const void * p) {
    uint16_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

static inline uint32_t load_u32(const void * p) {
    uint32_t v;
    memcpy(&v, p, sizeof(v));
    return v;
}

static inline float load_f32(const void * p) {
    float v;
    memcpy(&v, p, sizeof(v));
    return v;
}

// The value of an F16 and a BF16 at p.
static inline float load_f16(const void * p) {
    const uint32_t h        = load_u16(p);
    const uint32_t sign     = (h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu;
    const uint32_t mantissa = h & 0x3ffu;
    if (exponent == 0) { // zero and subnormals
        const float v = (float) mantissa * 0x1p-24f;
        return sign ? -v : v;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    return load_f32(&bits);
}

static inline float load_bf16(const void * p) {
    const uint32_t bits = (uint32_t) load_u16(p) << 16;
    return load_f32(&bits);
}

// The 8 scales and 8 mins (0..63) of a Q4_K or Q5_K block, one per byte, first in the lowest: the first four have
// their six bits in bytes 0-3 (mins: 4-7); the last four have their low bits in the nibbles of bytes 8-11 and their
// high two on top of the first four.
struct scales_k4 {
    uint64_t scale, min;
};

static inline scales_k4 unpack_scales_k4(const uint8_t * packed) {
    const uint32_t a = load_u32(packed), b = load_u32(packed + 4), c = load_u32(packed + 8);
    const uint32_t scale_low  = a & 0x3f3f3f3fu;
    const uint32_t scale_high = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
    const uint32_t min_low    = b & 0x3f3f3f3fu;
    const uint32_t min_high   = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
    return { scale_low | (uint64_t) scale_high << 32, min_low | (uint64_t) min_high << 32 };
}
