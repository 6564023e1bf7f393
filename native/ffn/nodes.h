// nodes.h: an FFN as nodes of libllama's graph.
#pragma once

#include "ggml.h"
#include "pinfer.h"

#include <vector>

// weight·x, plus a bias where the model has one.
struct pinfer_product {
    ggml_tensor * mul_mat = nullptr;
    ggml_tensor * add     = nullptr; // null: no bias
    ggml_tensor * weight  = nullptr;
    ggml_tensor * bias    = nullptr;

    ggml_tensor * out() const { return add ? add : mul_mat; }
};

// One FFN: down(act(gate·x, up·x)). x is [n_embd, n_tokens] F32, h [n_ff, n_tokens] F32.
// A stack of experts: the sum of those that a token is routed to, times their weights. x is [n_embd, 1, n_tokens] then,
// h [n_ff, k, n_tokens].
struct pinfer_ffn {
    int               index = -1; // its number, see header.h
    ggml_tensor *     x = nullptr;
    pinfer_product    gate, up, down; // gate.mul_mat null: ungated
    ggml_tensor *     inner = nullptr; // the unary below h where the graph spells the activation in two nodes
    ggml_tensor *     h     = nullptr; // the node that feeds down
    bool              h_is_read = false; // by others than down
    pinfer_activation graph_act = PINFER_ACT_OTHER;

    // of a stack
    ggml_tensor *              experts = nullptr;  // [k, n_tokens] I32: where tokens are routed to
    ggml_tensor *              weights = nullptr;  // [1, k, n_tokens] F32
    ggml_tensor *              weighted = nullptr; // down's output times the weights
    std::vector<ggml_tensor *> views;              // of the experts that are summed: the first n_used of k
    std::vector<ggml_tensor *> sums;               // n_used - 1 additions; a copy where there is one expert

    bool          gated() const { return gate.mul_mat != nullptr; }
    bool          is_stack() const { return experts != nullptr; }
    int64_t       n_tokens() const { return is_stack() ? x->ne[2] : x->ne[1]; }
    bool          is_half() const { return !down.mul_mat; } // ends in h: other nodes lie between it and down
    ggml_tensor * out() const { return is_half() ? h : is_stack() ? sums.back() : down.out(); }
};
