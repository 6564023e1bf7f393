// ffn.h: computes the FFN of a layer, sparsely on this CPU (and the hot device) or densely through ggml's CPU backend.
#pragma once

#include "ggml-backend.h"
#include "match.h"
#include "state.h"

#include <cstdint>
#include <vector>

// One per backend instance, so one per llama_context.
struct pinfer_engine {
    ggml_backend_t cpu = nullptr; // computes what is not sparse; takes the same threads
    int            n_threads = 4; // libllama's default, until the context sets its own
    ggml_context * graph_ctx = nullptr;
    ggml_cgraph *  graph = nullptr; // nodes on their way to `cpu`

    std::vector<uint8_t>             arena; // scratch of the executors, cut up anew for every FFN
    std::vector<float>               x_copy;
    std::vector<float>               hot_y;
    std::vector<const ggml_tensor *> activation_done; // per layer: the last activation node computed here
};

bool pinfer_engine_init(pinfer_engine * e);
void pinfer_engine_free(pinfer_engine * e);
void pinfer_engine_set_n_threads(pinfer_engine * e, int n_threads);

// All nodes of a split, in order.
ggml_status pinfer_engine_compute(pinfer_engine * e, pinfer_state * s, ggml_cgraph * graph);

// plugin.cpp: gives back the memory that a weight's pages take, where they are a mapped file
void pinfer_release_weight(const ggml_tensor * weight);

// ffn.cpp: one matched FFN
ggml_status pinfer_ffn_compute(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f);
// dense.cpp: plain nodes on the CPU backend, whole products, and the activation by itself
ggml_status pinfer_dense_nodes(pinfer_engine * e, ggml_tensor * const * nodes, int n);
// A product of all rows, from x [n_tokens, n] into p.out()
ggml_status pinfer_dense_product(pinfer_engine * e, const pinfer_product & p, const float * x);
ggml_status pinfer_dense_ffn(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, pinfer_activation act);
void        pinfer_dense_activation(const pinfer_engine * e, const pinfer_ffn & f, pinfer_activation act);
