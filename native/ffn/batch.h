// batch.h: a batch of tokens on its way through the neurons of an FFN: what all threads share.
#pragma once

#include "shares.h"
#include "sparse.h"

#include <algorithm>

namespace pinfer_batch {

// Tokens that a neuron is computed for at a time.
inline constexpr int64_t SLAB = 32;

// Neurons computed together: a tile.
inline constexpr int64_t GROUP = PINFER_TILE_ROWS;

struct x_view {
    const uint8_t * data = nullptr;
    size_t          row = 0; // bytes from token to token

    const uint8_t * token(int64_t t) const { return data + (size_t) t * row; }
};

// Neurons in a row that the same tokens need: all of an FFN, or those of an expert and some of the tokens routed to it.
struct segment {
    int64_t         n = 0;
    int64_t         row = 0;   // of its first neuron in gate, up and the predictor
    int64_t         down = 0;  // in down
    int64_t         place = 0; // of its candidates among all
    int64_t         n_tokens = 0;
    const int32_t * tokens = nullptr;  // of the batch; null: all
    const float *   weights = nullptr; // of the expert, for these tokens; null: 1
};

// What all threads share.
struct shared {
    const pinfer_sparse_job &    job;
    const pinfer_rows &          first;  // decides whether a neuron fires
    const pinfer_rows *          second; // null: ungated
    const pinfer_rows *          down;   // null: absent
    const pinfer_predictor_ffn * predictor;

    bool          from_disk; // rows may have to be read
    int64_t       n_tokens;
    const float * x;
    float *       h;

    std::vector<segment>      segments = {};
    std::vector<pinfer_share> shares = {}; // exact mode
    int64_t                   n_neurons = 0; // of all segments
    bool                      gathers = false; // segments are of some tokens only

    // cut from the team's arena by lay_out
    x_view     x_first = {}, x_second = {}, x_predictor = {}, z = {};
    float *    hidden = nullptr;     // [n_tokens, rank]
    int32_t *  candidates = nullptr; // [n_neurons], those of a segment and thread start at its share of the neurons
    uint32_t * named = nullptr;      // bit t: token t of the segment named the candidate beside it
    int64_t *  n_found = nullptr;    // [segments][threads]
    float *    partial = nullptr;    // [threads][n_tokens, n_embd]
    uint8_t *  own = nullptr;        // [threads] of own_size: memory of one worker
    size_t     own_size = 0;
};

inline int64_t neuron_id(const shared & s, int64_t j) {
    return s.job.neurons->ids ? s.job.neurons->ids[j] : j;
}

inline const uint8_t * row_at(const pinfer_rows & rows, int64_t j) {
    return rows.data + (size_t) j * rows.stride;
}

// Multiples of `step`: of GROUP where tiles have to be whole.
inline int64_t share_begin(int64_t n, int ith, int nth, int64_t step = GROUP) {
    const int64_t steps = (n + step - 1) / step;
    return std::min(n, steps * ith / nth * step);
}

inline size_t scratch_size(int64_t n_embd) {
    return ((size_t) n_embd * sizeof(float) + 63) / 64 * 64;
}

inline ggml_type predictor_x_type(const pinfer_predictor_ffn & p) {
    return p.bits ? PINFER_X_Q8 : p.a_kernel->x_type;
}

// The tokens and weights of every expert, and the segments they make.
struct routing {
    std::vector<int32_t> tokens;
    std::vector<float>   weights;
};

// Sorts the tokens [from, from + n_tokens) by the experts they are routed to, into segments.
void route(shared * s, const pinfer_routes & routes, const std::vector<int64_t> & place, int64_t from, routing * out);
// The buffers of a batch; returns their size.
size_t lay_out(shared * s, uint8_t * base, int n_threads);
// A thread's part of y: the sums of all threads, in their order.
void sum_up(const shared & s, int ith, int nth, float * y);

} // namespace pinfer_batch
