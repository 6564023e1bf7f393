// model.h: a model of this process: its GGUF, the rule of its FFN, its artefacts and devices, its counters and observer.
// Models are kept by the identity of their files, so that a weight's buffer leads to its model.
#pragma once

#include "activation.h"
#include "cold.h"
#include "device.h"
#include "header.h"
#include "observer.h"
#include "pinfer.h"
#include "predictor.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <sys/types.h>
#include <vector>

// A file whatever its path.
struct pinfer_file_id {
    dev_t dev = 0;
    ino_t ino = 0;

    auto operator<=>(const pinfer_file_id &) const = default;
};

// False where there is no such regular file.
bool pinfer_file_id_of(const char * path, pinfer_file_id * out);

// A file of a model that the plugin reads by itself; fd < 0: it cannot be opened.
class pinfer_own_file {
public:
    explicit pinfer_own_file(const char * path);
    pinfer_own_file(const pinfer_own_file &) = delete;
    pinfer_own_file & operator=(const pinfer_own_file &) = delete;
    ~pinfer_own_file();

    int fd = -1;
};

// The regular file that a loader has open as fd. False for those above: what a loader has open tells which model it loads.
bool pinfer_loaders_file(int fd, pinfer_file_id * out);

// The parameters of pinfer_configure(), kept.
struct pinfer_settings {
    std::string              model, predictor, cold; // empty: none
    std::vector<std::string> hot, devices;           // no devices: the GPUs in order
    pinfer_rule              rule;
    int64_t                  n_batch_dense = 0;

    bool operator==(const pinfer_settings &) const = default;
};

// What -ot takes for the tensors of FFNs.
#define PINFER_FFN_TENSORS "\\.(ffn_(up|gate|down)(_exps|_shexp)?|channel_mix_(key|value))\\.(weight|bias)"

enum pinfer_model_state {
    PINFER_MODEL_OPEN,       // its artefacts are open
    PINFER_MODEL_RECOGNISED, // by its header, in a program that knows nothing of pinfer: they are opened when its weights come
};

struct pinfer_model {
    std::atomic<pinfer_model_state> state{PINFER_MODEL_OPEN};
    std::string                     refusal; // why a recognised model must not be loaded; empty: it may
    std::atomic<bool>               asked{false}; // libllama wanted to know whether its FFN may lie in the plugin's buffers

    pinfer_file_id  id; // of its first file
    pinfer_settings settings;
    pinfer_header   header; // empty where the rule is OTHER
    uint64_t        order = 0; // models configured later have a higher one

    std::unique_ptr<pinfer_predictor>        predictor;
    std::vector<std::unique_ptr<pinfer_hot>> hot; // one a device, in the order in which their sums are added
    std::unique_ptr<pinfer_cold>             cold;

    std::atomic<int>  n_buffers{0}; // that hold weights of it
    std::atomic<bool> released{false}; // to be forgotten with the last of them

    // Several contexts may compute; the FFNs of a model run one at a time. What follows is for who holds the mutex.
    std::mutex        mutex;
    pinfer_observer   observer;
    pinfer_stats      stats = {};
    bool              announce_fallback = false; // say it once on stderr, where nobody asks for the counters
    std::string       failure; // why the last FFN could not be computed

    struct ffn_state {
        bool    checked = false; // the shards hold its rows
        uint8_t placed  = 0;     // parts (1 << pinfer_part) that lie in the plugin's buffers
        const void * proven = nullptr; // down weights of a stack elsewhere whose products are those of the hot shards
    };
    std::vector<ffn_state> ffns;
    std::map<const void *, std::vector<float>> biases; // those that the file does not have in F32, by their data

    const pinfer_rule & rule() const { return settings.rule; }

    // Experts without exact zeros: those of the hot shards are on devices, and ggml's CPU backend computes the others where
    // llama.cpp has put them.
    bool places_experts() const { return rule().act == PINFER_ACT_OTHER && !hot.empty(); }

    // Whether units of the FFN are on a device.
    bool is_hot(size_t ffn) const {
        return std::any_of(hot.begin(), hot.end(), [ffn](const auto & h) { return h->ffns[ffn].n > 0; });
    }

    // Whether the graph of llama.cpp, taken as it is, would compute something else.
    bool replaces_activation() const {
        return rule().act != PINFER_ACT_GRAPH && rule().act != PINFER_ACT_OTHER &&
               (rule().act != header.graph_activation || rule().threshold > 0.0f);
    }
};

// Opens what the settings name, checks it, and puts it in the place of an earlier configuration; see pinfer_configure().
bool pinfer_model_configure(const pinfer_settings & settings, std::string * err);
// The parts of it: opens what m->settings name, and puts m among the models.
bool pinfer_model_open(pinfer_model * m, std::string * err);
void pinfer_model_add(const std::shared_ptr<pinfer_model> & m);

// The model of that file, at once, or with the last buffer that holds weights of it.
void pinfer_model_release(const pinfer_file_id & id);

// The model that a file, or a part, belongs to; null where it is not configured.
std::shared_ptr<pinfer_model> pinfer_model_of(const pinfer_file_id & id);
std::shared_ptr<pinfer_model> pinfer_model_of(const char * path);
std::vector<std::shared_ptr<pinfer_model>> pinfer_models();

// Keeps the reason for who asks for it, or says it. The mutex is held.
void pinfer_model_fail(pinfer_model * m, const std::string & why);

// The first of its artefacts that was found to be damaged; null: none so far.
const pinfer_artefact * pinfer_model_damaged_file(const pinfer_model * m);

// Starts to compare its artefacts with their checksums in the background, when it is called first. The mutex is held.
void pinfer_model_begin_check(const pinfer_model * m);

// Waits, some seconds at most, until its artefacts have been compared with their checksums, and says on stderr what differs:
// it may have been used already. The mutex is held.
void pinfer_model_finish_check(const pinfer_model * m);

// Weights come and go.
void pinfer_model_place(pinfer_model * m, const ggml_tensor * weight);
void pinfer_model_hold(pinfer_model * m);
void pinfer_model_let_go(pinfer_model * m);
// Whether weights of any model lie in the plugin's buffers.
bool pinfer_models_in_use();
// First FFN that is not, as a whole, in the plugin's buffers; -1: there is none.
int pinfer_model_missing_ffn(pinfer_model * m);
