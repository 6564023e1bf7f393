// ffn.h: computes the FFN of a layer, sparsely on this CPU (and the hot device) or densely through ggml's CPU backend.
#pragma once

#include "activation.h"
#include "ggml-backend.h"
#include "match.h"
#include "model.h"

#include <cstdint>
#include <set>
#include <vector>

// One per backend instance, so one per llama_context.
struct pinfer_engine {
    ggml_backend_t cpu = nullptr; // computes what is not sparse; takes the same threads
    int            n_threads = 4; // libllama's default, until the context sets its own
    ggml_context * graph_ctx = nullptr;
    ggml_cgraph *  graph = nullptr; // nodes on their way to `cpu`

    std::vector<uint8_t>             arena; // scratch of the executors, cut up anew for every FFN
    std::vector<float>               x_copy;
    std::vector<pinfer_hot *>        hot_working; // devices that have a part of the FFN at hand, in their order
    std::vector<const float *>       hot_y;       // what each of them computed
    long                             blocks_read = 0; // by this process, when it was last asked
    std::set<int>                    released; // layers whose matrices in the model have given their memory back
    std::vector<const ggml_tensor *> activation_done; // per layer: the last activation node computed here
};

bool pinfer_engine_init(pinfer_engine * e);
void pinfer_engine_free(pinfer_engine * e);
void pinfer_engine_set_n_threads(pinfer_engine * e, int n_threads);

// At least size bytes, 64-byte aligned, good until the next call.
uint8_t * pinfer_engine_arena(pinfer_engine * e, size_t size);

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
// The same of n_rows rows, from x [n_tokens, n] into out [n_tokens, n_rows]
ggml_status pinfer_dense_rows(pinfer_engine * e, const pinfer_rows & rows, int64_t n, int64_t n_rows, const float * x,
                              int64_t n_tokens, float * out);
// All of these neurons for every token: whole first products, then the down rows of what is not zero
ggml_status pinfer_dense_neurons(pinfer_engine * e, const pinfer_ffn & f, const pinfer_neurons & neurons, const pinfer_rule & rule,
                                 const float * x);
// The matrix of a product as rows; kernel is null where its type has none
pinfer_rows pinfer_model_rows(const pinfer_product & p);
ggml_status pinfer_dense_ffn(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, const pinfer_rule & rule);
void        pinfer_dense_activation(const pinfer_engine * e, const pinfer_ffn & f, const pinfer_rule & rule);
