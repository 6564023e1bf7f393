// match.h: finds the FFN of a layer among the nodes that libllama's scheduler handed over, and says which nodes to claim.
#pragma once

#include "ggml.h"
#include "pinfer.h"

#include <cstdint>

enum pinfer_part { PINFER_PART_NONE, PINFER_PART_GATE, PINFER_PART_UP, PINFER_PART_DOWN };

// Part and layer of an FFN weight or bias, read from its GGUF name ("blk.7.ffn_up.weight"); NONE for anything else.
pinfer_part pinfer_tensor_part(const ggml_tensor * t, bool bias, int * layer);

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
    pinfer_activation graph_act = PINFER_ACT_OTHER;

    bool gated() const { return gate.mul_mat != nullptr; }
};

// The activation h of an FFN, traced back to its products. False when the nodes are none we know.
bool pinfer_match_activation(ggml_tensor * h, pinfer_ffn * out);

// The whole FFN that ends in the down product `down` (its bias is looked for at nodes[i_down+1 ...]). False when a node of
// it is not among the n nodes or is none we know.
bool pinfer_match_ffn(ggml_tensor ** nodes, int n, int i_down, pinfer_ffn * out);

// Whether the plugin computes this node: FFN products, their biases, and the activation between them. `is_ours` tells
// whether a weight lies (or may be put) in the plugin's buffers, `own_activation` that the model's is not the graph's.
bool pinfer_match_claims(const ggml_tensor * op, bool own_activation, bool (*is_ours)(const ggml_tensor * weight));
