// step.h: one step of decode attention, with a table of function pointers per instruction set.
//
// A block is 16 positions of the K and V cache of one KV head. A step reads it once for all rows that attend to it: a row is
// one query of one head. Rows keep an online softmax: the largest score so far, and sums relative to it.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PINFER_BLOCK_POSITIONS 16

struct pinfer_attention_row {
    const float *       q;     // k_size floats
    const ggml_fp16_t * mask;  // PINFER_BLOCK_POSITIONS values that are added to the scores; -inf: not attended to
    float *             state; // v_size weighted sums of V, then the largest score, then the sum of weights
};

// Cache lines to fetch ahead, position by position and all heads of a position in order, as they lie in memory. A step fetches
// n of them while it computes.
struct pinfer_attention_fetch {
    const char * at;
    size_t       n;
    size_t       left_in_row; // lines of this position
    size_t       row_lines;
    size_t       stride;
};

struct pinfer_attention_block {
    const char *   k;        // first position
    const char *   v;
    struct pinfer_attention_fetch * next_k; // of the block that follows, moved on by the step: where F16 is read as it is
    struct pinfer_attention_fetch * next_v;
    int64_t        n_ahead;  // where it is unpacked first: positions to the block that follows; 0: there is none
    size_t         k_stride; // bytes from one position to the next
    size_t         v_stride;
    int64_t        k_size;   // head sizes, multiples of PINFER_BLOCK_POSITIONS
    int64_t        v_size;
    enum ggml_type k_type;
    enum ggml_type v_type;
    int            n_positions; // 1 to PINFER_BLOCK_POSITIONS; the masks of the others must be -inf
    float          scale;
    float *        unpacked; // room for PINFER_BLOCK_POSITIONS * (k_size + v_size) floats, 64-byte aligned

    // Leave out every V whose weight is 0, where 0 * V might not be 0: another sequence's V may be inf or NaN.
    bool skip_zero_weights;

    const struct pinfer_attention_row * rows;
    int                                 n_rows;
};

// Adds a block to the states of its rows.
typedef void (*pinfer_attend_fn)(const struct pinfer_attention_block * block);

struct pinfer_attention_table {
    const char *     isa;
    pinfer_attend_fn attend; // NULL: not compiled for this machine's architecture
};

extern const struct pinfer_attention_table pinfer_attention_scalar;
extern const struct pinfer_attention_table pinfer_attention_avx2;
extern const struct pinfer_attention_table pinfer_attention_avx512;

// Whether caches of that type can be read.
static inline bool pinfer_attention_reads(enum ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
}

// The step of the instruction set in use (pinfer_kernel_isa), NULL where it has none.
pinfer_attend_fn pinfer_attention_step(void);

#ifdef __cplusplus
}
#endif
