// body.h: the step itself, written once over the primitives that an instruction set's file defines before it includes this
// one. Everything is static, see ../kernels/blocks.h.
//
//   vec, VEC_LANES                  float vector; VEC_LANES divides PINFER_BLOCK_POSITIONS
//   VEC_SUMS                        sums that fit in registers, beside what is multiplied
//   vec_zero/load/load_f16/load_i8/store/set1/set1_f16/add/mul/fma(a, b, c) = a*b + c
//   vec_load_nibbles<s>(p)          of VEC_LANES bytes, the low nibbles (s 0) or the high ones (s 4)
//   vec_max(a, b)                   b where either is NaN
//   vec_round(v)                    to the nearest integer
//   vec_times_power(v, n)           v * 2^n for integers n in -126..0
//   vec_zero_where_below(v, x, l)   0 where x < l, else v
//   vec_masked(v, m)                -inf where m is -inf, else v
//   vec_sum/largest(v)              over the lanes
//   vec_sums(p, out)                out[i] = sum of the VEC_LANES floats at p + i * VEC_LANES, for PINFER_BLOCK_POSITIONS i
#pragma once

#include <math.h>

namespace {

constexpr int N = PINFER_BLOCK_POSITIONS;

// Sums of each row, where R rows share the registers.
constexpr int sums_for(int rows, int most) {
    const int n = VEC_SUMS / (rows == 3 ? 4 : rows);
    return n < most ? n : most;
}

size_t row_bytes(enum ggml_type type, int64_t n) {
    return type == GGML_TYPE_Q8_0 ? (size_t) n / 32 * sizeof(block_q8_0)
           : type == GGML_TYPE_Q4_0 ? (size_t) n / 32 * sizeof(block_q4_0)
                                    : (size_t) n * 2;
}

// e^x for x in -inf..0: 2^n * e^r with x = n ln 2 + r, and the series of e^r to where it ends below half a unit of F32.
vec vec_exp(vec x) {
    const float lowest = -87.0f; // below, the result is not far from F32's smallest number
    const vec   y      = vec_max(vec_set1(lowest), x);
    const vec   n      = vec_round(vec_mul(y, vec_set1(1.44269504f)));
    const vec   high   = vec_fma(n, vec_set1(-0.693359375f), y); // ln 2 in two parts, the first of 10 bits
    const vec   r      = vec_fma(n, vec_set1(2.12194440e-4f), high);
    vec         sum    = vec_set1(1.0f / 5040.0f);
    sum                = vec_fma(sum, r, vec_set1(1.0f / 720.0f));
    sum                = vec_fma(sum, r, vec_set1(1.0f / 120.0f));
    sum                = vec_fma(sum, r, vec_set1(1.0f / 24.0f));
    sum                = vec_fma(sum, r, vec_set1(1.0f / 6.0f));
    sum                = vec_fma(sum, r, vec_set1(0.5f));
    sum                = vec_fma(sum, r, vec_set1(1.0f));
    sum                = vec_fma(sum, r, vec_set1(1.0f));
    return vec_zero_where_below(vec_times_power(sum, n), x, lowest);
}

// ---- caches that are unpacked first ------------------------------------------------------------------------------

void unpack_row(const block_q8_0 * row, int64_t n, float * out) {
    for (int64_t b = 0; b < n / 32; b++) {
        const vec d = vec_set1_f16(row[b].d);
        for (int i = 0; i < 32; i += VEC_LANES) {
            vec_store(out + 32 * b + i, vec_mul(d, vec_load_i8(row[b].q + i)));
        }
    }
}

void unpack_row(const block_q4_0 * row, int64_t n, float * out) {
    for (int64_t b = 0; b < n / 32; b++) {
        const vec d = vec_set1_f16(row[b].d), minus_8d = vec_mul(d, vec_set1(-8.0f));
        for (int i = 0; i < 16; i += VEC_LANES) {
            vec_store(out + 32 * b + i, vec_fma(d, vec_load_nibbles<0>(row[b].q + i), minus_8d));
            vec_store(out + 32 * b + i + 16, vec_fma(d, vec_load_nibbles<4>(row[b].q + i), minus_8d));
        }
    }
}

void unpack_row(const uint16_t * row, int64_t n, float * out) {
    for (int64_t i = 0; i < n; i += VEC_LANES) {
        vec_store(out + i, vec_load_f16(row + i));
    }
}

// The next line, into the second-level cache: a block of all heads is too large for the first.
void fetch(struct pinfer_attention_fetch * f) {
    if (f->n == 0) {
        return;
    }
    __builtin_prefetch(f->at, 0, 2);
    f->n--;
    if (--f->left_in_row == 0) {
        f->left_in_row = f->row_lines;
        f->at += f->stride - 64 * f->row_lines;
    }
    f->at += 64;
}

// The positions that there are, and the same ones of the next block fetched; the others are zeros.
void unpack(enum ggml_type type, const char * from, size_t stride, const struct pinfer_attention_block * b, int64_t n,
            float * out) {
    const size_t bytes = row_bytes(type, n), ahead = (size_t) b->n_ahead * stride;
    for (int p = 0; p < b->n_positions; p++, from += stride, out += n) {
        for (size_t i = 0; ahead && i < bytes; i += 64) {
            __builtin_prefetch(from + ahead + i, 0, 2);
        }
        switch (type) {
            case GGML_TYPE_Q8_0: unpack_row((const block_q8_0 *) from, n, out); break;
            case GGML_TYPE_Q4_0: unpack_row((const block_q4_0 *) from, n, out); break;
            default:             unpack_row((const uint16_t *) from, n, out); break;
        }
    }
    memset(out, 0, (size_t) (N - b->n_positions) * (size_t) n * sizeof(float));
}

vec load_float(const void * p) {
    return vec_load((const float *) p);
}

// Where to read K or V of a block.
struct values {
    const char * at;
    size_t       stride; // of a position
    int64_t      n;
    struct pinfer_attention_fetch * next; // to fetch a line of for each that is read, where unpack() does not
};

// ---- scores and sums for R rows at once ----------------------------------------------------------------------------
//
// Not inlined: the registers of the inner loops are all in use, and among other code g++ keeps sums in memory.

// scores[N * r + p] = q_r . k_p
template <vec (*load)(const void *), int size, int R>
__attribute__((noinline)) void multiply_k(const struct pinfer_attention_row * rows, const values & k, float * scores) {
    constexpr int P = sums_for(R, N);
    alignas(64) float lanes[R][N * VEC_LANES];
    struct pinfer_attention_fetch next = *k.next;
    for (int p = 0; p < N; p += P) {
        const char * at = k.at + (size_t) p * k.stride;
        vec          sums[R][P];
        for (int r = 0; r < R; r++) {
            for (int j = 0; j < P; j++) {
                sums[r][j] = vec_zero();
            }
        }
        for (int64_t i = 0; i < k.n; i += VEC_LANES) {
            vec q[R];
            for (int r = 0; r < R; r++) {
                q[r] = vec_load(rows[r].q + i);
            }
#pragma GCC unroll 16
            for (int j = 0; j < P; j++) {
                const vec w = load(at + (size_t) j * k.stride + size * i);
                if (size == 2 && size * i % 64 == 0) {
                    fetch(&next);
                }
                for (int r = 0; r < R; r++) {
                    sums[r][j] = vec_fma(w, q[r], sums[r][j]);
                }
            }
        }
        for (int j = 0; j < P; j++) {
            for (int r = 0; r < R; r++) {
                vec_store(lanes[r] + (p + j) * VEC_LANES, sums[r][j]);
            }
        }
    }
    *k.next = next;
    for (int r = 0; r < R; r++) {
        vec_sums(lanes[r], scores + N * r);
    }
}

// Columns [begin, n) as far as C vectors at a time go, then fewer at a time.
template <vec (*load)(const void *), int size, int R, int C>
__attribute__((noinline)) void add_v(const struct pinfer_attention_row * rows, const values & v, const float * weights, int64_t begin) {
    constexpr int                 width = C * VEC_LANES;
    struct pinfer_attention_fetch next  = *v.next;
    int64_t                       i     = begin;
    for (; i + width <= v.n; i += width) {
        vec sums[R][C];
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) {
                sums[r][c] = vec_load(rows[r].state + i + c * VEC_LANES);
            }
        }
        const char * at = v.at + size * i;
        for (int p = 0; p < N; p++, at += v.stride) {
            vec w[R];
            for (int r = 0; r < R; r++) {
                w[r] = vec_set1(weights[N * r + p]);
            }
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                const vec x = load(at + size * c * VEC_LANES);
                if (size == 2 && size * c * VEC_LANES % 64 == 0) {
                    fetch(&next);
                }
                for (int r = 0; r < R; r++) {
                    sums[r][c] = vec_fma(w[r], x, sums[r][c]);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) {
                vec_store(rows[r].state + i + c * VEC_LANES, sums[r][c]);
            }
        }
    }
    *v.next = next;
    if constexpr (C > 1) {
        add_v<load, size, R, C / 2>(rows, v, weights, i);
    }
}

template <vec (*load)(const void *), int size>
void add_v_careful(const struct pinfer_attention_row * row, const values & v, const float * weights) {
    for (int p = 0; p < N; p++) {
        for (int64_t i = 0; i < v.n && weights[p] != 0.0f; i += VEC_LANES) {
            const vec x = load(v.at + (size_t) p * v.stride + size * i);
            vec_store(row->state + i, vec_fma(vec_set1(weights[p]), x, vec_load(row->state + i)));
        }
    }
}

bool has_nan(const float * scores) {
    for (int p = 0; p < N; p++) {
        if (scores[p] != scores[p]) {
            return true;
        }
    }
    return false;
}

// Turns the scores of one row into weights relative to the largest score, old sums included. False: no weight is above 0.
bool weigh(const struct pinfer_attention_row * row, float scale, int64_t n, float * scores) {
    vec largest = vec_set1(-INFINITY);
    for (int p = 0; p < N; p += VEC_LANES) {
        const vec m = vec_load_f16(row->mask + p);
        const vec s = vec_masked(vec_fma(vec_load(scores + p), vec_set1(scale), m), m);
        largest     = vec_max(largest, s);
        vec_store(scores + p, s);
    }
    float *     largest_so_far = row->state + n;
    float *     sum            = row->state + n + 1;
    const float top            = vec_largest(largest);
    if (top == -INFINITY && !has_nan(scores)) {
        return false;
    }
    if (!(top <= *largest_so_far)) {
        if (*sum != 0.0f) {
            const float shrink = expf(*largest_so_far - top);
            for (int64_t i = 0; i < n; i += VEC_LANES) {
                vec_store(row->state + i, vec_mul(vec_set1(shrink), vec_load(row->state + i)));
            }
            *sum *= shrink;
        }
        *largest_so_far = top;
    }
    vec weights = vec_zero();
    for (int p = 0; p < N; p += VEC_LANES) {
        const vec w = vec_exp(vec_add(vec_load(scores + p), vec_set1(-*largest_so_far)));
        weights     = vec_add(weights, w);
        vec_store(scores + p, w);
    }
    *sum += vec_sum(weights);
    return true;
}

// F16 is read as it is, everything else has been unpacked.
template <int R>
void attend_rows(const struct pinfer_attention_block * b, const struct pinfer_attention_row * rows, const values & k,
                 const values & v, bool k_is_f16, bool v_is_f16) {
    alignas(64) float weights[R * N];
    if (k_is_f16) {
        multiply_k<vec_load_f16, 2, R>(rows, k, weights);
    } else {
        multiply_k<load_float, 4, R>(rows, k, weights);
    }
    for (int r = 0; r < R; r++) {
        if (!weigh(rows + r, b->scale, v.n, weights + N * r)) {
            memset(weights + N * r, 0, N * sizeof(float));
        }
    }
    constexpr int C = sums_for(R, 8);
    for (int r = 0; r < R && b->skip_zero_weights; r++) {
        if (v_is_f16) {
            add_v_careful<vec_load_f16, 2>(rows + r, v, weights + N * r);
        } else {
            add_v_careful<load_float, 4>(rows + r, v, weights + N * r);
        }
    }
    if (b->skip_zero_weights) {
        return;
    }
    if (v_is_f16) {
        add_v<vec_load_f16, 2, R, C>(rows, v, weights, 0);
    } else {
        add_v<load_float, 4, R, C>(rows, v, weights, 0);
    }
}

// A conversion for every group of rows costs more than one conversion that is kept.
constexpr int ROWS_AT_ONCE = 4;

void attend(const struct pinfer_attention_block * b) {
    const bool k_is_f16 = b->k_type == GGML_TYPE_F16 && b->n_rows <= ROWS_AT_ONCE && b->n_positions == N;
    const bool v_is_f16 = b->v_type == GGML_TYPE_F16 && b->n_rows <= ROWS_AT_ONCE && b->n_positions == N;
    values     k        = {b->k, b->k_stride, b->k_size, b->next_k};
    values     v        = {b->v, b->v_stride, b->v_size, b->next_v};
    if (!k_is_f16) {
        unpack(b->k_type, b->k, b->k_stride, b, b->k_size, b->unpacked);
        k = {(const char *) b->unpacked, (size_t) b->k_size * sizeof(float), b->k_size, b->next_k};
    }
    if (!v_is_f16) {
        float * const to = b->unpacked + N * b->k_size;
        unpack(b->v_type, b->v, b->v_stride, b, b->v_size, to);
        v = {(const char *) to, (size_t) b->v_size * sizeof(float), b->v_size, b->next_v};
    }
    for (int r = 0; r < b->n_rows; r += ROWS_AT_ONCE) {
        switch (b->n_rows - r) {
            case 1:  attend_rows<1>(b, b->rows + r, k, v, k_is_f16, v_is_f16); break;
            case 2:  attend_rows<2>(b, b->rows + r, k, v, k_is_f16, v_is_f16); break;
            case 3:  attend_rows<3>(b, b->rows + r, k, v, k_is_f16, v_is_f16); break;
            default: attend_rows<4>(b, b->rows + r, k, v, k_is_f16, v_is_f16); break;
        }
    }
}

} // namespace
