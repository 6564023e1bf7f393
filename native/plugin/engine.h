// engine.h: computes the nodes of a split that libllama's scheduler gives to the plugin.
#pragma once

#include "team.h"

#include <vector>

// One per backend instance, so one per llama_context.
struct pinfer_engine {
    pinfer_team                      team;
    std::vector<const ggml_tensor *> activation_done; // per layer: the last activation node computed here
};

// All nodes of a split, in order.
ggml_status pinfer_engine_compute(pinfer_engine * e, ggml_cgraph * graph);

// Whether the model behind this look-up of token embeddings has an FFN that llama.cpp would compute with another activation
// than the model's, because it lies outside the plugin's buffers. The plugin claims such a node, to fail at the first graph.
bool pinfer_engine_must_refuse(const ggml_tensor * op);
