// device.h: the hot neurons of one ggml device, computed there by ggml's own operations while the CPU does the cold ones.
#pragma once

#include "activation.h"
#include "artefact.h"
#include "header.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "pinfer.h"
#include "trace.h"

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

// How a device is driven.
enum pinfer_hot_drive {
    PINFER_HOT_INLINE,   // a CPU device shares the cores: what is begun is computed at once
    PINFER_HOT_QUEUED,   // takes commands and works by itself
    PINFER_HOT_THREADED, // its calls block, so a thread of its own makes them
};

// Where the tokens of a batch are routed to, for a stack of experts.
struct pinfer_routes {
    int64_t              n_used = 0; // experts of a token
    std::vector<int32_t> experts;    // [n_tokens, n_used]
    std::vector<float>   weights;    // [n_tokens, n_used]
};

// The graph of an FFN for a number of tokens, built once.
struct pinfer_hot_graph {
    pinfer_rule    rule;
    int64_t        n_tokens = 0;
    int64_t        n_used = 0; // experts of a token; 0: no stack
    std::unique_ptr<uint8_t[]> memory; // of ctx
    ggml_context * ctx = nullptr;
    ggml_cgraph *  graph = nullptr;
    ggml_tensor *  x = nullptr; // [n_embd, n_tokens]
    ggml_tensor *  y = nullptr; // [n_embd, n_tokens]
    ggml_tensor *  experts = nullptr; // [n_used, n_tokens]: places in the stack
    ggml_tensor *  weights = nullptr; // [1, n_used, n_tokens]

    pinfer_hot_graph() = default;
    pinfer_hot_graph(const pinfer_hot_graph &) = delete;
    pinfer_hot_graph & operator=(const pinfer_hot_graph &) = delete;
    ~pinfer_hot_graph();
};

struct pinfer_hot_ffn {
    int64_t         n = 0; // neurons, or experts of a stack; 0: nothing of this FFN is hot
    const int32_t * ids = nullptr;
    int64_t         n_embd = 0;
    ggml_tensor *   gate = nullptr; // [n_embd, n], null: ungated; of a stack [n_embd, n_ff, n]
    ggml_tensor *   up = nullptr;
    ggml_tensor *   down = nullptr; // [n, n_embd]; of a stack [n_ff, n_embd, n]
    std::vector<int32_t> place;     // of a stack: of each expert of the model, -1: it is not here
    int64_t              n_used = 0; // of a stack: the most experts that a token has here
    ggml_tensor *   gate_bias = nullptr; // [n]; of a stack [n_ff, n]
    ggml_tensor *   up_bias = nullptr;
    ggml_tensor *   down_bias = nullptr; // of a stack [n_embd, n]; any other is added by the CPU

    std::vector<std::unique_ptr<pinfer_hot_graph>> graphs; // the one used last comes first
};

// What a device has been asked for.
struct pinfer_hot_job {
    int                   ffn = -1;
    pinfer_rule           rule;
    const float *         x = nullptr; // [n_tokens, n_embd]
    int64_t               n_tokens = 0;
    const pinfer_routes * routes = nullptr; // of a stack; stays until the end
    // of a stack without exact zeros: libllama's own nodes, whose parameters count
    const ggml_tensor *   glu = nullptr;
    const ggml_tensor *   down = nullptr;
};

struct pinfer_hot {
    pinfer_artefact               file;
    std::string                   placement_id;
    std::string                   name; // of the ggml device
    std::vector<pinfer_hot_ffn>   ffns;
    pinfer_hot_drive              drive = PINFER_HOT_INLINE;
    ggml_backend_t                backend = nullptr;
    ggml_context *                weights = nullptr;
    ggml_backend_buffer_t         buffer = nullptr;
    ggml_gallocr_t                galloc = nullptr;
    size_t                        compute_size = 0; // of its buffer
    int                           n_threads = 0; // that the device was told of

    // x and y on the host: pinned where the device has memory for that
    ggml_backend_buffer_t pinned = nullptr;
    std::vector<float>    plain;
    float *               x = nullptr; // null: the caller's x is used
    float *               y = nullptr;
    int64_t               n_staged = 0; // values there is room for
    std::vector<int32_t>  experts; // of a job: places in the stack, and what their outputs are multiplied by
    std::vector<float>    factors;

    pinfer_hot_job   job;
    char             failure[160] = ""; // of the job; empty: none. No string: where memory is out it must still be kept
    std::atomic<int> layer_in_flight{-1};
    pinfer_span      copied, worked; // of the job: x handed over; from the launch until y was known to be there

    std::thread           thread; // THREADED only
    std::atomic<uint32_t> begun{0}, done{0};
    std::atomic<bool>     stop{false};

    pinfer_hot() = default;
    pinfer_hot(const pinfer_hot &) = delete;
    pinfer_hot & operator=(const pinfer_hot &) = delete;
    ~pinfer_hot();
};

// Maps a hot shard and checks it; needs no device.
bool pinfer_hot_read(pinfer_hot * hot, const char * path, const pinfer_origin & origin, std::string * err);

// Copies the weights of a shard that was read to its device (name of a ggml device; null: the index-th GPU) and makes it ready
// to compute. Needs no device where nothing is hot.
bool pinfer_hot_open(pinfer_hot * hot, const char * device, int index, std::string * err);

// Device memory in use, bytes: weights, and a compute buffer for PINFER_HOT_TOKENS tokens. Stays what it is after opening.
size_t pinfer_hot_bytes(const pinfer_hot * hot);

void pinfer_hot_set_n_threads(pinfer_hot * hot, int n_threads);

// Names of the devices of this process that have work, as in "device RPC0 failed in layer 7"; empty where none has. Takes no
// lock and gets no memory.
bool pinfer_hot_at_work(char * text, size_t text_len);

// Starts an FFN on x [n_tokens, n_embd], which must stay as it is until the end; returns at once unless the device is
// INLINE. Longer batches are cut into pieces of PINFER_HOT_TOKENS. What goes wrong is told by the end.
void pinfer_hot_begin(pinfer_hot * hot, const pinfer_hot_job & job) noexcept;
// Waits for y [n_tokens, n_embd], good until the next begin. Null: the device failed, hot->failure says how.
const float * pinfer_hot_end(pinfer_hot * hot) noexcept;

// run.cpp: makes room in the compute buffer for any batch of any layer
bool pinfer_hot_reserve(pinfer_hot * hot, const pinfer_rule & rule, std::string * err);
void pinfer_hot_start_thread(pinfer_hot * hot);
void pinfer_hot_stop_thread(pinfer_hot * hot);
