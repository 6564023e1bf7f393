// engine.h: computes the nodes of a split that libllama's scheduler gives to the plugin.
#pragma once

#include "model.h"
#include "team.h"

#include <memory>
#include <vector>

// One per backend instance, so one per llama_context.
struct pinfer_engine {
    pinfer_team                      team;
    std::vector<const ggml_tensor *> activation_done; // per FFN: the last activation node computed here
    std::weak_ptr<pinfer_model>      used;            // whose FFNs it computed last
};

// Says of artefacts that were used before they were checked whether they are damaged.
void pinfer_engine_finish(pinfer_engine * e);

// All nodes of a split, in order.
ggml_status pinfer_engine_compute(pinfer_engine * e, ggml_cgraph * graph);

// Whether the model behind this look-up of token embeddings has an FFN that llama.cpp would compute with another activation
// than the model's, because it lies outside the plugin's buffers. The plugin claims such a node, to fail at the first graph.
bool pinfer_engine_must_refuse(const ggml_tensor * op);
