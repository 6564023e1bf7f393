// state.cpp: the configuration half of pinfer.h.
#include "model.h"

#include "ggml-backend-impl.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

// From this many tokens on nothing is predicted. At 32 tokens naming neurons still is 1.4 times as fast (docs/benchmarks.md);
// beyond that batches are prompts, which are worth computing exactly.
static const int64_t N_BATCH_DENSE = 64;

pinfer_state & pinfer_state_get() {
    // never destroyed: at exit the libraries of a GPU may be gone before it, and freeing its buffers would abort
    static pinfer_state * const state = new pinfer_state;
    return *state;
}

static bool set_error(char * err, size_t err_len, const std::string & text) {
    if (err && err_len) {
        snprintf(err, err_len, "%s", text.c_str());
    }
    return false;
}

// Every neuron of every layer must be in exactly one shard.
static bool shards_are_whole(const std::vector<std::unique_ptr<pinfer_hot>> & hot, const pinfer_cold & cold, std::string * err) {
    std::vector<bool> seen;
    for (size_t il = 0; il < cold.layers.size(); il++) {
        seen.assign((size_t) cold.n_ff, false);
        int64_t n   = 0;
        auto    add = [&](const int32_t * ids, int64_t count) {
            for (int64_t j = 0; j < count; j++) {
                n += !seen[(size_t) ids[j]];
                seen[(size_t) ids[j]] = true;
            }
            return count;
        };
        int64_t total = add(cold.layers[il].ids, cold.layers[il].n);
        for (const auto & device : hot) {
            total += add(device->layers[il].ids, device->layers[il].n);
        }
        if (n != cold.n_ff || total != cold.n_ff) {
            *err = cold.file.path + ": the shards do not hold every neuron of layer " + std::to_string(il) +
                   " exactly once; make them anew with: pinfer split";
            return false;
        }
    }
    return true;
}

static size_t count_of(const char * const * names) {
    size_t n = 0;
    while (names && names[n]) {
        n++;
    }
    return n;
}

// The hot shards, one to a device, of the placement that the cold shard is of.
static bool open_hot(const pinfer_params & p, const pinfer_origin & origin, const pinfer_cold * cold,
                     std::vector<std::unique_ptr<pinfer_hot>> * hot, std::string * err) {
    const size_t n = count_of(p.hot_paths), n_devices = count_of(p.devices);
    if (p.devices && n_devices != n) {
        *err = std::string(p.hot_paths[0]) + " is one of " + std::to_string(n) + " hot shards, but " + std::to_string(n_devices) +
               " devices are named; name as many with --device, or make the shards anew with: pinfer solve " + p.model_path +
               " --device, then pinfer split";
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        hot->push_back(std::make_unique<pinfer_hot>());
        pinfer_hot & h = *hot->back();
        if (!pinfer_hot_open(&h, p.hot_paths[i], p.devices ? p.devices[i] : nullptr, (int) i, origin, err)) {
            return false;
        }
        if (!cold || cold->placement_id != h.placement_id || cold->layers.size() != h.layers.size()) {
            *err = std::string(p.hot_paths[i]) + " and the cold shard are of different placements; make both anew with: pinfer split " +
                   p.model_path;
            return false;
        }
    }
    return true;
}

static bool open_artefacts(const pinfer_params & p, std::unique_ptr<pinfer_predictor> * predictor,
                           std::vector<std::unique_ptr<pinfer_hot>> * hot, std::unique_ptr<pinfer_cold> * cold,
                           std::string * err) {
    const bool any_hot = count_of(p.hot_paths) > 0;
    if (!p.predictor_path && !any_hot && !p.cold_path) {
        return true;
    }
    if (!p.model_path) {
        *err = "artefacts need the model they belong to";
        return false;
    }
    pinfer_origin origin = {
        .model_path  = p.model_path,
        .fingerprint = "",
        .activation  = (pinfer_activation) p.activation,
        .threshold   = p.activation_threshold,
    };
    if (!pinfer_fingerprint_file(p.model_path, &origin.fingerprint, err)) {
        return false;
    }
    if (p.predictor_path) {
        *predictor = std::make_unique<pinfer_predictor>();
        if (!pinfer_predictor_open(predictor->get(), p.predictor_path, origin, err)) {
            return false;
        }
    }
    if (p.cold_path) {
        *cold = std::make_unique<pinfer_cold>();
        if (!pinfer_cold_open(cold->get(), p.cold_path, origin, err)) {
            return false;
        }
    }
    if (any_hot && !open_hot(p, origin, cold->get(), hot, err)) {
        return false;
    }
    if (*cold && !shards_are_whole(*hot, **cold, err)) {
        return false;
    }
    if (*predictor) {
        pinfer_predictor_arrange(predictor->get(), *cold ? &(*cold)->layers : nullptr);
    }
    return true;
}

bool pinfer_configure(const pinfer_params * params, char * err, size_t err_len) try {
    std::unique_ptr<pinfer_predictor> predictor;
    std::vector<std::unique_ptr<pinfer_hot>> hot;
    std::unique_ptr<pinfer_cold>      cold;
    std::string                       why;
    if (params->activation < PINFER_ACT_GRAPH || params->activation > PINFER_ACT_OTHER) {
        return set_error(err, err_len, "unknown activation; allowed are relu, relu2, reglu and drelu");
    }
    const float threshold = params->activation_threshold;
    if (!std::isfinite(threshold) || threshold < 0.0f || (threshold > 0.0f && params->activation == PINFER_ACT_GRAPH)) {
        return set_error(err, err_len, "the activation threshold must be 0 or more, and 0 where no activation is named");
    }
    if (!open_artefacts(*params, &predictor, &hot, &cold, &why)) {
        return set_error(err, err_len, why);
    }
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.rule          = {(pinfer_activation) params->activation, threshold};
    s.n_batch_dense = params->n_batch_dense > 0 ? params->n_batch_dense : N_BATCH_DENSE;
    s.predictor     = std::move(predictor);
    s.hot           = std::move(hot);
    s.cold          = std::move(cold);
    s.observer      = {};
    s.stats         = {};
    s.failure.clear();
    std::vector<std::string> devices;
    for (const auto & h : s.hot) {
        devices.push_back(h->name);
    }
    pinfer_trace_open(devices);
    return true;
} catch (const std::exception & e) {
    return set_error(err, err_len, std::string("out of memory while opening the artefacts: ") + e.what());
}

// NaN, which pinfer_configure() refuses, where the text is no number.
static float number(const char * text) {
    char *      end   = nullptr;
    const float value = strtof(text, &end);
    return end != text && *end == '\0' ? value : NAN;
}

// The parts of a text between commas.
static std::vector<std::string> parts_of(const char * text) {
    std::vector<std::string> parts;
    for (std::string rest = text ? text : ""; !rest.empty();) {
        const size_t comma = rest.find(',');
        parts.push_back(rest.substr(0, comma));
        rest.erase(0, comma == std::string::npos ? comma : comma + 1);
    }
    return parts;
}

static std::vector<const char *> pointers_to(const std::vector<std::string> & texts) {
    std::vector<const char *> out;
    for (const std::string & t : texts) {
        out.push_back(t.c_str());
    }
    out.push_back(nullptr);
    return out;
}

void pinfer_state_configure_from_env() {
    const char * activation = getenv("PINFER_ACTIVATION");
    if (!activation) {
        return;
    }
    const char * threshold = getenv("PINFER_ACTIVATION_THRESHOLD");
    const char * model     = getenv("PINFER_MODEL");
    const char * folder    = getenv("PINFER_ARTEFACTS");
    auto         path      = [&](const char * name) {
        const std::string p = model && folder ? std::string(folder) + "/" + name : "";
        return !p.empty() && access(p.c_str(), R_OK) == 0 ? p : std::string();
    };
    auto or_null = [](const std::string & s) { return s.empty() ? nullptr : s.c_str(); };

    const std::string        predictor = path("predictor.gguf"), cold = path("cold.gguf");
    std::vector<std::string> hot     = parts_of(getenv("PINFER_HOT"));
    std::vector<std::string> devices = parts_of(getenv("PINFER_DEVICE"));
    if (hot.empty()) {
        for (std::string p = path("hot.gguf"); !p.empty(); p = path(("hot-" + std::to_string(hot.size()) + ".gguf").c_str())) {
            hot.push_back(p);
        }
    }
    const std::vector<const char *> hot_paths = pointers_to(hot), device_names = pointers_to(devices);
    const pinfer_params params = {
        .model_path           = model,
        .predictor_path       = or_null(predictor),
        .hot_paths            = hot_paths.data(),
        .cold_path            = or_null(cold),
        .devices              = devices.empty() || hot.empty() ? nullptr : device_names.data(),
        .activation           = pinfer_activation_parse(activation),
        .n_batch_dense        = 0,
        .activation_threshold = threshold ? number(threshold) : 0.0f,
    };
    char err[1024];
    if (!pinfer_configure(&params, err, sizeof(err))) {
        fprintf(stderr, "pinfer: %s\n", err);
    }
    pinfer_state_get().announce_fallback = true; // nobody else will ask for the counters
}

void pinfer_get_stats(pinfer_stats * stats) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    *stats           = s.stats;
    stats->hot_bytes = 0;
    for (const auto & hot : s.hot) {
        stats->hot_bytes += pinfer_hot_bytes(hot.get());
    }
}

uint64_t pinfer_hot_shard_bytes(int32_t i) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    return i >= 0 && (size_t) i < s.hot.size() ? pinfer_hot_bytes(s.hot[(size_t) i].get()) : 0;
}

// Beside its neurons a batch takes x, y and, for each neuron, its products, the activation and what a threshold needs, all in
// F32. ggml aligns tensors to 512 bytes at most, and gives some devices as much to spare.
uint64_t pinfer_hot_compute_bytes(uint64_t n_embd, uint64_t n_hot) {
    return n_hot ? 4 * PINFER_HOT_TOKENS * (2 * n_embd + 3 * n_hot) + 16 * 512 : 0;
}

void pinfer_state_fail(pinfer_state * s, const std::string & why) {
    s->failure = why;
    if (s->announce_fallback) {
        fprintf(stderr, "pinfer: %s\n", why.c_str());
    }
}

bool pinfer_devices_at_work(char * text, size_t text_len) {
    std::string names;
    int         layer = -1;
    for (const auto & hot : pinfer_state_get().hot) {
        const int il = hot->layer_in_flight;
        if (il >= 0) {
            names += (names.empty() ? "" : " or ") + hot->name;
            layer = il;
        }
    }
    return layer >= 0 && (set_error(text, text_len, "device " + names + " failed in layer " + std::to_string(layer)), true);
}

bool pinfer_last_failure(char * err, size_t err_len) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    return !s.failure.empty() && (set_error(err, err_len, s.failure), true);
}

void pinfer_stats_reset(void) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.stats = {};
}

const char * pinfer_isa(void) {
    return pinfer_kernel_isa();
}

struct activation_entry {
    pinfer_activation act;
    const char *      name;
};

static const activation_entry activations[] = {
    {PINFER_ACT_RELU, "relu"},   {PINFER_ACT_RELU2, "relu2"}, {PINFER_ACT_REGLU, "reglu"},
    {PINFER_ACT_DRELU, "drelu"}, {PINFER_ACT_OTHER, "other"}, {PINFER_ACT_GRAPH, "graph"},
};

// Architectures whose graph in llama.cpp has a ReLU-family FFN.
static const activation_entry architectures[] = {
    {PINFER_ACT_RELU2, "arcee"},
    {PINFER_ACT_RELU2, "nemotron"},
    {PINFER_ACT_RELU2, "plm"},
    {PINFER_ACT_RELU2, "jais2"},
};

const char * pinfer_activation_name(pinfer_activation act) {
    for (const auto & a : activations) {
        if (a.act == act) {
            return a.name;
        }
    }
    return "other";
}

pinfer_activation pinfer_activation_parse(const char * name) {
    for (const auto & a : activations) {
        if (!strcmp(a.name, name)) {
            return a.act;
        }
    }
    return PINFER_ACT_GRAPH;
}

pinfer_activation pinfer_arch_activation(const char * arch) {
    for (const auto & a : architectures) {
        if (!strcmp(a.name, arch)) {
            return a.act;
        }
    }
    return PINFER_ACT_OTHER;
}

bool pinfer_fingerprint(const char * path, char out[33], char * err, size_t err_len) try {
    std::string hex, why;
    if (!pinfer_fingerprint_file(path, &hex, &why)) {
        return set_error(err, err_len, why);
    }
    memcpy(out, hex.c_str(), 33);
    return true;
} catch (const std::exception & e) {
    return set_error(err, err_len, std::string(path) + " cannot be read: " + e.what());
}

bool pinfer_observer_start(const pinfer_observer_params * params, char * err, size_t err_len) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    if (s.rule.act == PINFER_ACT_OTHER) {
        return set_error(err, err_len, "the model's activation has no exact zeros, there is nothing to count");
    }
    s.observer             = {};
    s.observer.max_samples = params->n_samples;
    s.observer.stride      = params->stride ? params->stride : 1;
    s.observer.on          = true;
    return true;
}

void pinfer_observer_stop(void) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.observer.on = false;
}

bool pinfer_observer_get(int32_t layer, pinfer_observer_layer * out) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    *out = {};
    if (layer < 0 || (size_t) layer >= s.observer.layers.size()) {
        return false;
    }
    const pinfer_observer_store & l = s.observer.layers[(size_t) layer];
    *out = {
        .count     = l.count.data(),
        .mass      = l.mass.data(),
        .x         = l.x.data(),
        .active    = l.active.data(),
        .n_ff      = l.n_ff,
        .n_embd    = l.n_embd,
        .n_samples = l.n_samples,
        .n_tokens  = l.n_tokens,
    };
    return true;
}
