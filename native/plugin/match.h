// match.h: finds FFNs among the nodes that libllama's scheduler handed over, and says which nodes to claim.
#pragma once

#include "header.h"
#include "nodes.h"

struct ggml_cgraph;

// The activation h of an FFN, traced back to its products. False when the nodes are none we know.
bool pinfer_match_activation(ggml_tensor * h, pinfer_ffn * out);

// The whole FFN that ends in the down product at node i_down (its bias, or the sum over the experts, is looked for behind it).
// False when a node of it is not in the graph, is none we know, or is read by a node outside the FFN (a LoRA, say): only h of
// an FFN without experts may be, which is noted.
bool pinfer_match_ffn(const ggml_cgraph * graph, int i_down, pinfer_ffn * out);

// The first half of an FFN, which ends in its activation at node i_h; the same conditions.
bool pinfer_match_half(const ggml_cgraph * graph, int i_h, pinfer_ffn * out);

// What makes an operation one of an FFN.
struct pinfer_claim {
    const ggml_tensor * weight = nullptr; // the weight or bias that it works with, or whose product it takes; null: not of an FFN
    bool                adapted = false;  // an activation whose products are behind a LoRA adapter
};

pinfer_claim pinfer_match_claim(const ggml_tensor * op);

// Whether libllama has named a node as the activation of an FFN ("ffn_swiglu-7", "ffn_moe_reglu-7").
bool pinfer_is_named_activation(const ggml_tensor * t);
