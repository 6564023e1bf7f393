// api.cpp: the functions of pinfer.h.
#include "artefact.h"
#include "model.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>

static bool set_error(char * err, size_t err_len, const std::string & text) {
    if (err && err_len) {
        snprintf(err, err_len, "%s", text.c_str());
    }
    return false;
}

static std::vector<std::string> list_of(const char * const * names) {
    std::vector<std::string> out;
    for (size_t i = 0; names && names[i]; i++) {
        out.push_back(names[i]);
    }
    return out;
}

static std::string text_of(const char * text) {
    return text ? text : "";
}

// The model of that path, or all of them.
static std::vector<std::shared_ptr<pinfer_model>> models_of(const char * path) {
    if (!path) {
        return pinfer_models();
    }
    const auto m = pinfer_model_of(path);
    return m ? std::vector{m} : std::vector<std::shared_ptr<pinfer_model>>{};
}

bool pinfer_configure(const pinfer_params * params, char * err, size_t err_len) try {
    const pinfer_settings settings = {
        .model         = text_of(params->model_path),
        .predictor     = text_of(params->predictor_path),
        .cold          = text_of(params->cold_path),
        .hot           = list_of(params->hot_paths),
        .devices       = list_of(params->devices),
        .rule          = {(pinfer_activation) params->activation, params->activation_threshold},
        .n_batch_dense = params->n_batch_dense,
    };
    std::string why;
    return pinfer_model_configure(settings, &why) || set_error(err, err_len, why);
} catch (const std::exception & e) {
    return set_error(err, err_len, std::string("the artefacts cannot be opened: ") + e.what());
}

void pinfer_release(const char * model_path) {
    if (const auto m = pinfer_model_of(model_path)) {
        pinfer_model_release(m->id);
    }
}

void pinfer_get_stats(const char * model_path, pinfer_stats * stats) {
    *stats = {};
    for (const auto & m : models_of(model_path)) {
        std::lock_guard<std::mutex> lock(m->mutex);
        const pinfer_stats &        s = m->stats;
        stats->n_tokens += s.n_tokens;
        stats->n_tokens_dense += s.n_tokens_dense;
        stats->n_neurons += s.n_neurons;
        stats->n_candidates += s.n_candidates;
        stats->n_active += s.n_active;
        stats->n_hot += s.n_hot;
        stats->n_fallback += s.n_fallback;
        stats->seconds_copy += s.seconds_copy;
        stats->seconds_hot += s.seconds_hot;
        stats->seconds_cold += s.seconds_cold;
        stats->seconds_wait += s.seconds_wait;
        stats->seconds_overlap += s.seconds_overlap;
        for (const auto & hot : m->hot) {
            stats->hot_bytes += pinfer_hot_bytes(hot.get());
        }
    }
}

void pinfer_stats_reset(const char * model_path) {
    for (const auto & m : models_of(model_path)) {
        std::lock_guard<std::mutex> lock(m->mutex);
        m->stats = {};
    }
}

uint64_t pinfer_hot_shard_bytes(const char * model_path, int32_t i) {
    const auto m = pinfer_model_of(model_path);
    if (!m) {
        return 0;
    }
    std::lock_guard<std::mutex> lock(m->mutex);
    return i >= 0 && (size_t) i < m->hot.size() ? pinfer_hot_bytes(m->hot[(size_t) i].get()) : 0;
}

// Beside its neurons a batch takes x, y and, for each neuron, its products, the activation and what a threshold needs, all in
// F32. ggml aligns tensors to 512 bytes at most, and gives some devices as much to spare.
uint64_t pinfer_hot_compute_bytes(uint64_t n_embd, uint64_t n_hot) {
    return n_hot ? 4 * PINFER_HOT_TOKENS * (2 * n_embd + 3 * n_hot) + 16 * 512 : 0;
}

bool pinfer_unread(const char * path, int32_t i, uint64_t * offset, uint64_t * size) {
    pinfer_file_id id;
    const auto     m = pinfer_model_of(path);
    if (!m || !m->cold || !pinfer_file_id_of(path, &id)) {
        return false;
    }
    std::vector<bool> is_this; // of the model's files
    for (const std::string & file : m->header.files) {
        pinfer_file_id other;
        is_this.push_back(pinfer_file_id_of(file.c_str(), &other) && other == id);
    }
    for (size_t ffn = 0; ffn < m->header.ffns.size(); ffn++) {
        for (const pinfer_part part : {PINFER_PART_GATE, PINFER_PART_UP, PINFER_PART_DOWN}) {
            const pinfer_matrix & matrix   = m->header.ffns[ffn].part(part);
            const bool            in_shard = part == PINFER_PART_DOWN || pinfer_ffn_kind_of((int) ffn) != PINFER_FFN_EXPERTS;
            if (matrix.ne[1] > 0 && in_shard && is_this[matrix.file] && i-- == 0) {
                *offset = matrix.offset;
                *size   = ggml_row_size(matrix.type, matrix.ne[0]) * (size_t) (matrix.ne[1] * matrix.ne[2]);
                return true;
            }
        }
    }
    return false;
}

bool pinfer_lock(const char * model_path, char * err, size_t err_len) {
    const auto m = pinfer_model_of(model_path);
    if (m && m->cold && mlock(m->cold->file.map, m->cold->file.size) != 0) {
        return set_error(err, err_len, m->cold->file.path + " cannot be locked in memory: " + strerror(errno));
    }
    return true;
}

bool pinfer_devices_at_work(char * text, size_t text_len) {
    return pinfer_hot_at_work(text, text_len);
}

bool pinfer_last_failure(const char * model_path, char * err, size_t err_len) {
    for (const auto & m : models_of(model_path)) {
        std::lock_guard<std::mutex> lock(m->mutex);
        if (!m->failure.empty()) {
            set_error(err, err_len, m->failure);
            return true;
        }
    }
    return false;
}

const char * pinfer_isa(void) {
    return pinfer_kernel_isa();
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

bool pinfer_observer_start(const char * model_path, const pinfer_observer_params * params, char * err, size_t err_len) {
    const auto m = pinfer_model_of(model_path);
    if (!m || m->rule().act == PINFER_ACT_OTHER) {
        return set_error(err, err_len, m ? "the model's activation has no exact zeros, there is nothing to count"
                                         : text_of(model_path) + " is not configured, so there is nothing to count");
    }
    std::lock_guard<std::mutex> lock(m->mutex);
    m->observer             = {};
    m->observer.max_samples = params->n_samples;
    m->observer.stride      = params->stride ? params->stride : 1;
    m->observer.on          = true;
    return true;
}

void pinfer_observer_stop(const char * model_path) {
    if (const auto m = pinfer_model_of(model_path)) {
        std::lock_guard<std::mutex> lock(m->mutex);
        m->observer.on = false;
    }
}

bool pinfer_observer_get(const char * model_path, const char * name, pinfer_observer_ffn * out) {
    *out         = {};
    const auto m = pinfer_model_of(model_path);
    if (!m) {
        return false;
    }
    std::lock_guard<std::mutex> lock(m->mutex);
    for (size_t i = 0; i < m->observer.ffns.size(); i++) {
        if (name && pinfer_ffn_name((int) i) == name) {
            const pinfer_observer_store & s = m->observer.ffns[i];
            *out = {
                .count         = s.count.data(),
                .mass          = s.mass.data(),
                .x             = s.x.data(),
                .active        = s.active.data(),
                .routed        = s.routed.data(),
                .experts       = s.experts.data(),
                .n_neurons     = s.count.size(),
                .n_embd        = s.n_embd,
                .n_experts     = s.routed.size(),
                .n_expert_used = s.n_used,
                .n_samples     = s.n_samples,
                .n_tokens      = s.n_tokens,
            };
            return true;
        }
    }
    return false;
}
