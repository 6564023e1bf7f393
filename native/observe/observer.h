// observer.h: counts which neurons fire and keeps some FFN inputs, for pinfer profile.
#pragma once

#include "pinfer.h"

#include <cstdint>
#include <vector>

struct pinfer_observer_store {
    std::vector<uint64_t> count;  // [n_ff]
    std::vector<double>   mass;   // [n_ff]
    std::vector<uint16_t> x;      // [n_samples, n_embd] F16
    std::vector<uint8_t>  active; // [n_samples, ceil(n_ff/8)]
    uint64_t n_ff = 0, n_embd = 0, n_samples = 0, n_tokens = 0;
};

struct pinfer_observer {
    bool                               on = false;
    uint64_t                           max_samples = 0;
    uint64_t                           stride = 1;
    std::vector<pinfer_observer_store> layers;
};

// Adds a batch of layer il: x [n_embd, n_tokens], h = f(x) [n_ff, n_tokens].
void pinfer_observer_add(pinfer_observer * o, int il, const float * x, const float * h, int64_t n_embd, int64_t n_ff,
                         int64_t n_tokens, int n_threads);
