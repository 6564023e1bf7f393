// observer.h: counts which neurons fire and keeps some FFN inputs, for pinfer profile.
#pragma once

#include "pinfer.h"

#include <cstdint>
#include <vector>

struct pinfer_observer_store {
    std::vector<uint64_t> count;   // [n_neurons], of all experts of a stack
    std::vector<double>   mass;    // [n_neurons]
    std::vector<uint16_t> x;       // [n_samples, n_embd] F16
    std::vector<uint8_t>  active;  // [n_samples, ceil(n_ff/8)]; empty for a stack
    std::vector<uint64_t> routed;  // [n_experts] tokens; empty unless it is a stack
    std::vector<int32_t>  experts; // [n_samples, n_used] of a stack
    uint64_t n_embd = 0, n_used = 0, n_samples = 0, n_tokens = 0;
};

struct pinfer_observer {
    bool                               on = false;
    uint64_t                           max_samples = 0;
    uint64_t                           stride = 1;
    std::vector<pinfer_observer_store> ffns; // by their number
};

// What an FFN computed for a batch.
struct pinfer_observed {
    int             ffn = -1;
    const float *   x = nullptr; // [n_tokens, n_embd]
    const float *   h = nullptr; // f(x) [n_tokens, n_used, n_ff]; n_used is 1 unless it is a stack
    int64_t         n_embd = 0, n_ff = 0, n_tokens = 0;
    // of a stack
    int64_t         n_experts = 0, n_used = 1;
    const int32_t * experts = nullptr; // [n_tokens, n_used]; null: no stack
    int64_t         h_token = 0; // values of h from token to token
};

void pinfer_observer_add(pinfer_observer * o, const pinfer_observed & seen, int n_threads);
