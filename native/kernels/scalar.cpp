// scalar.cpp: the reference kernels, in plain loops. Each quantised type is unpacked into integers, one scale per 16
// weights and one offset per 32; what the other files do is measured against this.
#include "blocks.h"
#include "tables.h"

#include <math.h>

namespace {

// One block as weight[i] = scale[i / 16] * q[i] + offset[i / 32].
struct unpacked {
    int8_t q[256];
    float  scale[16];
    float  offset[8];
};

void unpack_nibbles(const uint8_t * q, unpacked * u) {
    for (int i = 0; i < 16; i++) {
        u->q[i]      = (int8_t) (q[i] & 15);
        u->q[i + 16] = (int8_t) (q[i] >> 4);
    }
}

void unpack_fifth_bits(const uint8_t * qh, unpacked * u) {
    const uint32_t bits = load_u32(qh);
    for (int i = 0; i < 32; i++) {
        u->q[i] = (int8_t) (u->q[i] + (((bits >> i) & 1) << 4));
    }
}

void unpack_centre(int centre, unpacked * u) {
    for (int i = 0; i < 32; i++) {
        u->q[i] = (int8_t) (u->q[i] - centre);
    }
}

void unpack_scale(const uint8_t * d, float offset, unpacked * u) {
    u->scale[0] = u->scale[1] = load_f16(d);
    u->offset[0]              = offset;
}

void unpack(const block_q8_0 * b, unpacked * u) {
    memcpy(u->q, b->q, sizeof(b->q));
    unpack_scale(b->d, 0.0f, u);
}

void unpack(const block_q4_0 * b, unpacked * u) {
    unpack_nibbles(b->q, u);
    unpack_centre(8, u);
    unpack_scale(b->d, 0.0f, u);
}

void unpack(const block_q4_1 * b, unpacked * u) {
    unpack_nibbles(b->q, u);
    unpack_scale(b->d, load_f16(b->m), u);
}

void unpack(const block_q5_0 * b, unpacked * u) {
    unpack_nibbles(b->q, u);
    unpack_fifth_bits(b->qh, u);
    unpack_centre(16, u);
    unpack_scale(b->d, 0.0f, u);
}

void unpack(const block_q5_1 * b, unpacked * u) {
    unpack_nibbles(b->q, u);
    unpack_fifth_bits(b->qh, u);
    unpack_scale(b->d, load_f16(b->m), u);
}

void unpack_k4(const uint8_t * d, const uint8_t * dmin, const uint8_t * scales, const uint8_t * q, unpacked * u) {
    const scales_k4 s = unpack_scales_k4(scales);
    for (int g = 0; g < 8; g++) {
        u->scale[2 * g] = u->scale[2 * g + 1] = load_f16(d) * (float) ((s.scale >> (8 * g)) & 63);
        u->offset[g]                          = -load_f16(dmin) * (float) ((s.min >> (8 * g)) & 63);
        for (int i = 0; i < 32; i++) {
            const uint8_t byte = q[32 * (g / 2) + i];
            u->q[32 * g + i]   = (int8_t) (g % 2 ? byte >> 4 : byte & 15);
        }
    }
}

void unpack(const block_q4_k * b, unpacked * u) {
    unpack_k4(b->d, b->dmin, b->scales, b->q, u);
}

void unpack(const block_q5_k * b, unpacked * u) {
    unpack_k4(b->d, b->dmin, b->scales, b->q, u);
    for (int i = 0; i < 256; i++) {
        u->q[i] = (int8_t) (u->q[i] + (((b->qh[i % 32] >> (i / 32)) & 1) << 4));
    }
}

void unpack(const block_q6_k * b, unpacked * u) {
    for (int g = 0; g < 16; g++) {
        u->scale[g] = load_f16(b->d) * b->scales[g];
    }
    for (int g = 0; g < 8; g++) {
        u->offset[g] = 0.0f;
    }
    for (int i = 0; i < 256; i++) {
        const int     half = i / 128, k = i % 128; // k = 64 * (high nibble) + byte of ql
        const uint8_t byte = b->ql[64 * half + k % 64];
        const int     low  = k < 64 ? byte & 15 : byte >> 4;
        const int     high = (b->qh[32 * half + k % 32] >> (2 * (k / 32))) & 3;
        u->q[i]            = (int8_t) ((low | (high << 4)) - 32);
    }
}

template <typename B> constexpr int64_t block_size             = 32;
template <> constexpr int64_t           block_size<block_q4_k> = 256;
template <> constexpr int64_t           block_size<block_q5_k> = 256;
template <> constexpr int64_t           block_size<block_q6_k> = 256;

template <typename B> float dot(int64_t n, const void * row, const void * x) {
    const pinfer_x_q8 v   = x_q8_at(x, n);
    float             sum = 0.0f;
    for (int64_t i = 0; i < n / block_size<B>; i++) {
        unpacked u;
        unpack((const B *) row + i, &u);
        for (int64_t g = 0; g < block_size<B> / 16; g++) {
            const int64_t at       = i * block_size<B> + 16 * g;
            int32_t       products = 0, total = 0;
            for (int64_t j = 0; j < 16; j++) {
                products += u.q[16 * g + j] * v.q[at + j];
                total += v.q[at + j];
            }
            sum += v.d[at / 32] * (u.scale[g] * (float) products + u.offset[g / 2] * (float) total);
        }
    }
    return sum;
}

template <typename B> void axpy(int64_t n, float a, const void * row, float * y, float *) {
    for (int64_t i = 0; i < n / block_size<B>; i++) {
        unpacked u;
        unpack((const B *) row + i, &u);
        for (int j = 0; j < block_size<B>; j++) {
            y[i * block_size<B> + j] += a * (u.scale[j / 16] * u.q[j] + u.offset[j / 32]);
        }
    }
}

template <float (*load)(const void *), int size> float dot_float(int64_t n, const void * row, const void * x) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        sum += load((const char *) row + i * size) * ((const float *) x)[i];
    }
    return sum;
}

template <float (*load)(const void *), int size>
void axpy_float(int64_t n, float a, const void * row, float * y, float *) {
    for (int64_t i = 0; i < n; i++) {
        y[i] += a * load((const char *) row + i * size);
    }
}

void prepare_x_q8(const float * x, void * dst, int64_t n) {
    const pinfer_x_q8 v = x_q8_at(dst, n);
    memset(v.q, 0, x_q8_padded(n));
    for (int64_t i = 0; i < n / 32; i++) {
        float largest = 0.0f;
        for (int64_t j = 32 * i; j < 32 * i + 32; j++) {
            largest = fmaxf(largest, fabsf(x[j]));
        }
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        v.d[i]   = largest / 127.0f;
        v.s32[i] = 0.0f;
        for (int64_t h = 2 * i; h < 2 * i + 2; h++) {
            int32_t total = 0;
            for (int64_t j = 16 * h; j < 16 * h + 16; j++) {
                v.q[j] = (int8_t) nearbyintf(x[j] * inverse);
                total += v.q[j];
            }
            v.s16[h] = v.d[i] * (float) total;
            v.s32[i] += v.s16[h];
        }
    }
    x_q8_fill_lanes(&v, n);
}

void nonzero(int64_t n, const float * a, uint64_t * bits) {
    for (int64_t i = 0; i < n; i++) {
        bits[i / 64] = (i % 64 ? bits[i / 64] : 0) | (uint64_t) (a[i] != 0.0f) << i % 64;
    }
}

void add_rows(int64_t n, const float * w, const uint64_t * rows, const float * const * a, int64_t n_tokens, float * y,
              int64_t y_row) {
    for (int64_t t = 0; t < n_tokens; t++) {
        const float * factor = a[t];
        for (int64_t r = 0; r < PINFER_SUM_ROWS; r++) {
            if (rows[t] >> r & 1) {
                for (int64_t j = 0; j < n; j++) {
                    y[t * y_row + j] += *factor * w[r * n + j];
                }
                factor++;
            }
        }
    }
}

#define NO_BATCHES            nullptr, nullptr, nullptr, nullptr, nullptr, nullptr
template <int bits>
void multiply_bits(int64_t n, int64_t begin, int64_t end, const void * tile, const void * x, size_t x_row, int64_t n_tokens,
                   float * out, int64_t out_row) {
    const tile_group_bits<bits> * g = (const tile_group_bits<bits> *) tile - begin / 32;
    for (int64_t t = 0; t < n_tokens; t++) {
        const pinfer_x_q8 v = x_q8_at((const char *) x + (size_t) t * x_row, n);
        for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
            float sum = 0.0f;
            for (int64_t j = begin; j < end; j++) {
                const int64_t c = j % 32 / 4;
                const int     q = g[j / 32].q[c % bits][r][j % 4] >> (c / bits * bits) & ((1 << bits) - 1);
                sum += v.d[j / 32] * (float) (v.q[j] * (2 * q - ((1 << bits) - 1)));
            }
            out[t * out_row + r] += sum;
        }
    }
}

#define ROW(B)                PINFER_X_Q8, dot<B>, axpy<B>, NO_BATCHES
#define FLOAT_ROW(load, size) GGML_TYPE_F32, dot_float<load, size>, axpy_float<load, size>, NO_BATCHES

const struct pinfer_kernel kernels[] = {
    { GGML_TYPE_F32, FLOAT_ROW(load_f32, 4) },   { GGML_TYPE_F16, FLOAT_ROW(load_f16, 2) },
    { GGML_TYPE_BF16, FLOAT_ROW(load_bf16, 2) }, { GGML_TYPE_Q8_0, ROW(block_q8_0) },
    { GGML_TYPE_Q4_0, ROW(block_q4_0) },         { GGML_TYPE_Q4_1, ROW(block_q4_1) },
    { GGML_TYPE_Q5_0, ROW(block_q5_0) },         { GGML_TYPE_Q5_1, ROW(block_q5_1) },
    { GGML_TYPE_Q4_K, ROW(block_q4_k) },         { GGML_TYPE_Q5_K, ROW(block_q5_k) },
    { GGML_TYPE_Q6_K, ROW(block_q6_k) },
};

} // namespace

const struct pinfer_kernel_table pinfer_kernels_scalar = { "scalar", kernels, sizeof(kernels) / sizeof(kernels[0]),
                                                           prepare_x_q8, nonzero, add_rows,
                                                           { multiply_bits<1>, multiply_bits<2> } };
