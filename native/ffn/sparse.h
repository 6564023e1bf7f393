// sparse.h: computes the neurons of one FFN that fire, on this CPU.
#pragma once

#include "cold.h"
#include "device.h"
#include "predictor.h"
#include "team.h"

struct pinfer_sparse_job {
    const pinfer_neurons *         neurons = nullptr;
    const pinfer_predictor_ffn * predictor = nullptr; // null: every neuron is a candidate
    pinfer_rule                    rule;
    bool                           gated = false;
    const pinfer_routes *          routes = nullptr; // of a stack, whose neurons all have down rows
    int64_t                        n_embd = 0, n_ff = 0; // n_ff of one expert
    int64_t                        n_tokens = 0;
    const float *                  x = nullptr; // [n_tokens, n_embd]
    float *                        y = nullptr; // [n_tokens, n_embd] takes the sums; null where neurons have no down rows
    float *                        h = nullptr; // [n_tokens, n_ff] takes f_i(x) there, zero before
};

struct pinfer_sparse_counts {
    uint64_t candidates = 0, active = 0; // (token, neuron) pairs
};

pinfer_sparse_counts pinfer_sparse_compute(pinfer_team * team, const pinfer_sparse_job & job);

// y [n_tokens, n_embd] = the down rows of what is not zero in h [n_tokens, n_ff].
void pinfer_sparse_down(pinfer_team * team, const pinfer_neurons & neurons, const float * h, int64_t n_ff, int64_t n_embd,
                        int64_t n_tokens, float * y);
