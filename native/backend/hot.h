// hot.h: the hot neurons, computed densely by ggml's own operations on another ggml device while the CPU does the cold ones.
#pragma once

#include "activation.h"
#include "artefact.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "pinfer.h"

#include <string>
#include <vector>

struct pinfer_hot_layer {
    int64_t       n = 0; // 0: nothing of this layer is hot
    const int32_t * ids = nullptr;
    ggml_tensor * gate = nullptr; // [n_embd, n], null: ungated
    ggml_tensor * up = nullptr;
    ggml_tensor * down = nullptr; // [n, n_embd]
    ggml_tensor * gate_bias = nullptr;
    ggml_tensor * up_bias = nullptr;
};

struct pinfer_hot {
    pinfer_artefact               file;
    std::string                   placement_id;
    int64_t                       n_embd = 0;
    std::vector<pinfer_hot_layer> layers;
    ggml_backend_t                backend = nullptr;
    ggml_context *                weights = nullptr;
    ggml_backend_buffer_t         buffer = nullptr;
    ggml_gallocr_t                galloc = nullptr;
    ggml_context *                graph_ctx = nullptr; // the graph in flight
    ggml_tensor *                 y = nullptr;
    std::vector<uint8_t>          graph_mem;

    pinfer_hot() = default;
    pinfer_hot(const pinfer_hot &) = delete;
    pinfer_hot & operator=(const pinfer_hot &) = delete;
    ~pinfer_hot();
};

// Maps hot.gguf and copies its weights to the device (name of a ggml device, null: the first GPU).
bool pinfer_hot_open(pinfer_hot * hot, const char * path, const char * device, const pinfer_origin & origin,
                     std::string * err);

// Device memory in use: weights and the compute buffer, bytes.
size_t pinfer_hot_bytes(const pinfer_hot * hot);

void pinfer_hot_set_n_threads(pinfer_hot * hot, int n_threads);

// Starts layer il on x [n_embd, n_tokens] and returns at once where the device is asynchronous. False: the device failed.
bool pinfer_hot_begin(pinfer_hot * hot, int il, const pinfer_rule & rule, const float * x, int64_t n_tokens);
// Waits and fetches y [n_embd, n_tokens].
bool pinfer_hot_end(pinfer_hot * hot, float * y, int64_t n_tokens);
