// nodes.h: the FFN of a layer as nodes of libllama's graph.
#pragma once

#include "ggml.h"
#include "pinfer.h"

// weight·x, plus a bias where the model has one.
struct pinfer_product {
    ggml_tensor * mul_mat = nullptr;
    ggml_tensor * add     = nullptr; // null: no bias
    ggml_tensor * weight  = nullptr;
    ggml_tensor * bias    = nullptr;

    ggml_tensor * out() const { return add ? add : mul_mat; }
};

// The FFN of one layer: down(act(gate·x, up·x)). x is [n_embd, n_tokens] F32, h [n_ff, n_tokens] F32.
struct pinfer_ffn {
    int               layer = -1;
    ggml_tensor *     x = nullptr;
    pinfer_product    gate, up, down; // gate.mul_mat null: ungated
    ggml_tensor *     inner = nullptr; // the unary below h where the graph spells the activation in two nodes
    ggml_tensor *     h     = nullptr; // the node that feeds down
    bool              h_is_read = false; // by others than down
    pinfer_activation graph_act = PINFER_ACT_OTHER;

    bool gated() const { return gate.mul_mat != nullptr; }
};
