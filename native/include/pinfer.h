// pinfer.h: the C interface of libggml-pinfer.so beyond the ggml backend it registers.
//
// The plugin serves any number of models in one process, each by its own configuration; a model is named by the path of its
// GGUF (of several files, the first: m-00001-of-00003.gguf), and two paths of one file name the same model. The order is: load the plugin (ggml_backend_load), pinfer_configure()
// for the model's path, load that file with libllama, decode. A model that was never configured is left to llama.cpp.
//
// Every function may be called through ctypes and from any thread; strings are UTF-8. Functions that can fail return false and
// write one line into err: what happened, then the command that fixes it.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(PINFER_BUILD)
#    define PINFER_API __attribute__((visibility("default")))
#else
#    define PINFER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PINFER_FORMAT_VERSION 2

// A hot device computes at most this many tokens at a time; longer batches are cut. Its compute buffer is made for so many
// when it is opened (pinfer_hot_compute_bytes), and never grows. Fewer would leave a GPU waiting for its weights.
#define PINFER_HOT_TOKENS 256

// What the FFN of the model computes: relu, relu2, reglu, drelu, reglu2 (the square of a ReLU of the gate, times up).
enum pinfer_activation {
    PINFER_ACT_GRAPH = 0,  // whatever the graph of libllama says
    PINFER_ACT_RELU  = 1,
    PINFER_ACT_RELU2 = 2,
    PINFER_ACT_REGLU = 3,
    PINFER_ACT_DRELU = 4,
    PINFER_ACT_REGLU2 = 6,
    PINFER_ACT_OTHER = 5,  // SiLU, GELU, ...: no exact zeros. With hot shards whole experts are computed on devices, without them
                           // there is nothing for pinfer to do
};

// Zero-initialise, then set what is wanted: every zero is the default.
struct pinfer_params {
    const char * model_path;      // GGUF that is configured; required
    const char * predictor_path;  // predictor.gguf, NULL: exact mode
    const char * const * hot_paths; // hot.gguf, hot-1.gguf, ..., NULL at the end; NULL: no hot part
    const char * cold_path;       // cold.gguf, NULL: neurons are read from the model itself
    const char * const * devices; // ggml device of each hot shard, NULL at the end; NULL: the GPUs in order, an error
                                  // where there are too few
    int32_t      activation;      // enum pinfer_activation; OTHER: the model is llama.cpp's, but for the experts of hot shards
    int32_t      n_batch_dense;   // from this many tokens a batch is computed densely; 0: default
    float        activation_threshold; // relu(v) is v where v exceeds this, else 0; finite, >= 0, and 0 with ACT_GRAPH
};

// Counters of a model since pinfer_configure() or pinfer_stats_reset().
struct pinfer_stats {
    uint64_t n_tokens;       // (FFN, token) pairs computed sparsely
    uint64_t n_tokens_dense; // (FFN, token) pairs computed densely (prefill)
    uint64_t n_neurons;      // neurons of those sparse pairs
    uint64_t n_candidates;   // neurons whose first product was computed
    uint64_t n_active;       // neurons that fired
    uint64_t n_hot;          // neurons that were computed on hot devices
    uint64_t n_fallback;     // graph nodes computed by the plain CPU backend because nothing matched them
    uint64_t hot_bytes;      // device memory taken by the hot part, over all devices

    // Of the FFNs that have a hot part. What of the shorter side is hidden: seconds_overlap / min(seconds_hot, seconds_cold).
    double seconds_copy;    // x handed to the devices, the work queued there
    double seconds_hot;     // from the first launch until the last device was known to be done
    double seconds_cold;    // the CPU with its own neurons
    double seconds_wait;    // the CPU waiting for devices
    double seconds_overlap; // hot and cold at the same time
};

// Checks the artefacts against the model and against each other, and opens them. Replaces an earlier configuration of the same
// model: the old hot devices are closed before the new ones are opened. Returns false
//   - and leaves the earlier configuration as it was, where a file is missing, damaged or of another model, or where a
//     llama_model loaded from this file is still in use under another configuration (the same one is accepted again, and its
//     counters go on);
//   - and leaves the model unconfigured, where only opening a device failed.
PINFER_API bool pinfer_configure(const struct pinfer_params * params, char * err, size_t err_len);

// Forgets the configuration of a model and frees its hot devices and mappings: at once, or, while a llama_model loaded from
// the file is in use, when that is freed. A path that was never configured is ignored.
PINFER_API void pinfer_release(const char * model_path);

// Counters of a model; model_path NULL: of all configured models together. Zeros for a model that is not configured.
PINFER_API void pinfer_get_stats(const char * model_path, struct pinfer_stats * stats);
PINFER_API void pinfer_stats_reset(const char * model_path);

// Device memory that a hot part takes, bytes: what hot shard i (from 0) of a model took when it was opened, 0 beyond the last;
// and of that the compute buffer, as an upper bound for a device whose largest layer has n_hot neurons.
PINFER_API uint64_t pinfer_hot_shard_bytes(const char * model_path, int32_t i);
PINFER_API uint64_t pinfer_hot_compute_bytes(uint64_t n_embd, uint64_t n_hot);

// Bytes of a file of the model (any of its parts) that are not read when it is computed from its shards, which hold them: range i
// from 0; false, and nothing written, beyond the last, and where there is no cold shard.
PINFER_API bool pinfer_unread(const char * path, int32_t i, uint64_t * offset, uint64_t * size);

// Reads the cold shard of a model into memory and keeps it there, as mlock(2) does; a model without one is ignored. False where
// the system refuses; what was locked until then stays so.
PINFER_API bool pinfer_lock(const char * model_path, char * err, size_t err_len);

// Why the last FFN of a model (NULL: of any) failed ("device CUDA0 failed in layer 7 (...)"); false, and nothing written,
// where it did not.
PINFER_API bool pinfer_last_failure(const char * model_path, char * err, size_t err_len);

// "device RPC0 failed in layer 7": the devices, of all models, that have been given work which they have not returned; false
// where none has. For a callback of ggml_set_abort_callback(), by which some of ggml's backends end the process: takes no lock.
PINFER_API bool pinfer_devices_at_work(char * text, size_t text_len);

// "avx512", "avx2", "neon" or "scalar": the kernels in use (PINFER_ISA forces one).
PINFER_API const char * pinfer_isa(void);

// Activation a GGUF architecture has by itself in llama.cpp ("arcee" -> RELU2), OTHER when it has no exact zeros.
PINFER_API enum pinfer_activation pinfer_arch_activation(const char * arch);
PINFER_API const char *           pinfer_activation_name(enum pinfer_activation act); // "relu2"
PINFER_API enum pinfer_activation pinfer_activation_parse(const char * name);         // GRAPH when unknown

// Fingerprint of a GGUF: 32 hex digits and NUL into out[33]. Covers the whole header (metadata and tensor table), the file
// size and blocks of every tensor (docs/formats.md), of all parts where path is the first of several, so it costs milliseconds
// whatever the size.
PINFER_API bool pinfer_fingerprint(const char * path, char out[33], char * err, size_t err_len);

// Checksum of a tensor's bytes, as the artefacts' key pinfer.checksums holds it (docs/formats.md). Runs at the speed of memory.
PINFER_API uint64_t pinfer_checksum(const void * data, size_t size);

// Observer of a model: counts what fires. While it runs every FFN of the model is computed exactly and densely.
struct pinfer_observer_params {
    uint64_t n_samples; // FFN inputs to keep per FFN (the first of every stride tokens), 0: none
    uint64_t stride;    // keep every stride-th token, >= 1
};
PINFER_API bool pinfer_observer_start(const char * model_path, const struct pinfer_observer_params * params, char * err,
                                      size_t err_len);
// Keeps what was counted until the next start, configure or release.
PINFER_API void pinfer_observer_stop(const char * model_path);
// Pointers stay valid until the next start, configure or release; NULL/0 where an FFN never ran.
//   count [n_neurons] uint64: tokens in which the neuron fired;  mass [n_neurons] double: sum of its output |f_i(x)|
//   x [n_samples, n_embd] F16 (row-major, IEEE half bits); active [n_samples, ceil(n_ff/8)] bits, neuron i at byte i/8, bit i%8
// Of a stack of experts, whose neuron i of expert e is number e*n_ff + i, and which has no activity bits:
//   routed [n_experts] uint64: tokens routed to the expert;  experts [n_samples, n_expert_used] int32: where samples were routed to
struct pinfer_observer_ffn {
    const uint64_t * count;
    const double *   mass;
    const uint16_t * x;
    const uint8_t *  active;
    const uint64_t * routed;
    const int32_t *  experts;
    uint64_t n_neurons, n_embd, n_experts, n_expert_used, n_samples, n_tokens;
};
// An FFN by its name in artefacts: "blk.7", "blk.7.shexp", "blk.7.exps". False: model or FFN unknown.
PINFER_API bool pinfer_observer_get(const char * model_path, const char * name, struct pinfer_observer_ffn * out);

#ifdef __cplusplus
}
#endif
