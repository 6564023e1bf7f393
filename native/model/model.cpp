// model.cpp: opens models, checks their parts against each other, and keeps them.
#include "model.h"

#include <cmath>
#include <cstdio>
#include <fcntl.h>
#include <set>
#include <sys/stat.h>
#include <unistd.h>

// From this many tokens on nothing is predicted. At 32 tokens naming neurons still is 1.4 times as fast (docs/benchmarks.md);
// beyond that batches are prompts, which are worth computing exactly.
static const int64_t N_BATCH_DENSE = 64;

bool pinfer_file_id_of(const char * path, pinfer_file_id * out) {
    struct stat st = {};
    if (!path || stat(path, &st) != 0 || !S_ISREG(st.st_mode)) {
        return false;
    }
    *out = {st.st_dev, st.st_ino};
    return true;
}

static std::mutex    own_files_mutex;
static std::set<int> own_files;

pinfer_own_file::pinfer_own_file(const char * path) {
    std::lock_guard<std::mutex> lock(own_files_mutex); // nobody may look at it before it is known
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        own_files.insert(fd);
    }
}

pinfer_own_file::~pinfer_own_file() {
    std::lock_guard<std::mutex> lock(own_files_mutex);
    if (fd >= 0) {
        own_files.erase(fd);
        close(fd);
    }
}

bool pinfer_loaders_file(int fd, pinfer_file_id * out) {
    std::lock_guard<std::mutex> lock(own_files_mutex);
    struct stat                 st = {};
    if (own_files.contains(fd) || fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        return false;
    }
    *out = {st.st_dev, st.st_ino};
    return true;
}

// --- opening ----------------------------------------------------------------------------------------------------------

// Every neuron, and every expert of a stack, must be in exactly one shard.
static bool shards_are_whole(const pinfer_model & m, std::string * err) {
    std::vector<bool> seen;
    for (size_t i = 0; i < m.header.ffns.size(); i++) {
        const pinfer_ffn_header & f       = m.header.ffns[i];
        const bool                is_stack = pinfer_ffn_kind_of((int) i) == PINFER_FFN_EXPERTS;
        const int64_t             n_units = f.n_ff() == 0 ? 0 : is_stack ? f.n_experts() : f.n_ff();
        seen.assign((size_t) n_units, false);
        int64_t n   = 0;
        auto    add = [&](const int32_t * ids, int64_t count) {
            for (int64_t j = 0; j < count; j++) {
                n += !seen[(size_t) ids[j]];
                seen[(size_t) ids[j]] = true;
            }
            return count;
        };
        int64_t total = m.cold ? add(m.cold->ffns[i].ids, m.cold->ffns[i].n) : 0;
        for (const auto & device : m.hot) {
            total += add(device->ffns[i].ids, device->ffns[i].n);
        }
        if (n != total || (m.cold && n != n_units)) { // without a cold shard the others are read from the model
            const pinfer_artefact & file = m.cold ? m.cold->file : m.hot[0]->file;
            *err = file.path + ": the shards do not hold every " + (is_stack ? "expert" : "neuron") + " of " +
                   pinfer_ffn_title((int) i) + " exactly once; make them again: pinfer split " + m.settings.model;
            return false;
        }
    }
    return true;
}

// The hot shards, one to a device, of the placement that the cold shard is of.
static bool read_hot(pinfer_model * m, const pinfer_origin & origin, std::string * err) {
    const pinfer_settings & s = m->settings;
    if (!s.hot.empty() && !s.devices.empty() && s.devices.size() != s.hot.size()) {
        *err = s.hot[0] + " is one of " + std::to_string(s.hot.size()) + " hot shards, but " + std::to_string(s.devices.size()) +
               " devices are named; name as many with --hot-device, or make the shards again: pinfer solve " + s.model +
               ", then pinfer split";
        return false;
    }
    for (const std::string & path : s.hot) {
        m->hot.push_back(std::make_unique<pinfer_hot>());
        pinfer_hot & h = *m->hot.back();
        if (!pinfer_hot_read(&h, path.c_str(), origin, err)) {
            return false;
        }
        const bool fits = m->places_experts() ? m->hot[0]->placement_id == h.placement_id
                                              : m->cold && m->cold->placement_id == h.placement_id;
        if (!fits) {
            *err = path + " and the other shards are of different placements; make them again: pinfer split " + s.model;
            return false;
        }
    }
    return true;
}

// All that needs no device.
static bool read_files(pinfer_model * m, std::string * err) {
    const pinfer_settings & s = m->settings;
    const bool              any = !s.predictor.empty() || !s.cold.empty() || !s.hot.empty();
    if (s.rule.act == PINFER_ACT_OTHER && !any) {
        return true;
    }
    if (m->header.files.empty() && !pinfer_header_read(s.model.c_str(), &m->header, err)) {
        return false;
    }
    m->ffns.resize(m->header.ffns.size());
    if (m->replaces_activation() && !m->header.obstacle.empty()) {
        *err = s.model + " cannot be computed as " + pinfer_activation_name(s.rule.act) + ": " + m->header.obstacle;
        return false;
    }
    if (!any) {
        return true;
    }
    if (s.rule.act == PINFER_ACT_OTHER) {
        if (!s.predictor.empty() || !s.cold.empty()) {
            *err = s.model + " has no exact zeros, so it takes neither a predictor nor a cold shard; make its shards again: "
                             "pinfer split " + s.model;
            return false;
        }
        pinfer_header_keep_stacks(&m->header);
    }
    pinfer_origin origin = {.model_path = s.model.c_str(), .fingerprint = "", .rule = s.rule, .header = m->header};
    if (!pinfer_fingerprint_files(m->header.files, &origin.fingerprint, err)) {
        return false;
    }
    if (!s.predictor.empty()) {
        m->predictor = std::make_unique<pinfer_predictor>();
        if (!pinfer_predictor_open(m->predictor.get(), s.predictor.c_str(), origin, err)) {
            return false;
        }
    }
    if (!s.cold.empty()) {
        m->cold = std::make_unique<pinfer_cold>();
        if (!pinfer_cold_open(m->cold.get(), s.cold.c_str(), origin, err)) {
            return false;
        }
    }
    return read_hot(m, origin, err) && ((!m->cold && !m->places_experts()) || shards_are_whole(*m, err));
}

static void open_trace(const pinfer_model & m) {
    std::vector<std::string> devices;
    for (const auto & h : m.hot) {
        devices.push_back(h->name);
    }
    pinfer_trace_open(devices);
}

static bool open_devices(pinfer_model * m, std::string * err) {
    const std::vector<std::string> & devices = m->settings.devices;
    for (size_t i = 0; i < m->hot.size(); i++) {
        if (!pinfer_hot_open(m->hot[i].get(), devices.empty() ? nullptr : devices[i].c_str(), (int) i, err)) {
            return false;
        }
    }
    if (m->predictor) {
        pinfer_predictor_arrange(m->predictor.get(), m->cold ? &m->cold->ffns : nullptr);
    }
    return true;
}

bool pinfer_model_open(pinfer_model * m, std::string * err) {
    if (m->settings.n_batch_dense <= 0) {
        m->settings.n_batch_dense = N_BATCH_DENSE;
    }
    if (!read_files(m, err) || !open_devices(m, err)) {
        return false;
    }
    open_trace(*m);
    return true;
}

static bool check_settings(const pinfer_settings & s, std::string * err) {
    if (s.rule.act < PINFER_ACT_GRAPH || s.rule.act > PINFER_ACT_REGLU2) {
        *err = "unknown activation; it is one of relu, relu2, reglu, drelu and reglu2";
        return false;
    }
    const float threshold = s.rule.threshold;
    if (!std::isfinite(threshold) || threshold < 0.0f || (threshold > 0.0f && s.rule.act == PINFER_ACT_GRAPH)) {
        *err = "the activation threshold must be 0 or more, and 0 where no activation is named";
        return false;
    }
    return true;
}

// --- keeping ----------------------------------------------------------------------------------------------------------

namespace {

struct registry {
    std::mutex                                              mutex;
    std::map<pinfer_file_id, std::shared_ptr<pinfer_model>> models;
    uint64_t                                                n_configured = 0;
};

registry & models() {
    // never destroyed: at exit the libraries of a GPU may be gone before it, and freeing its buffers would abort
    static registry * const r = new registry;
    return *r;
}

} // namespace

bool pinfer_model_configure(const pinfer_settings & settings, std::string * err) {
    static std::mutex           one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);

    auto model      = std::make_shared<pinfer_model>();
    model->settings = settings;
    if (model->settings.n_batch_dense <= 0) {
        model->settings.n_batch_dense = N_BATCH_DENSE;
    }
    if (!check_settings(settings, err)) {
        return false;
    }
    if (!pinfer_file_id_of(settings.model.c_str(), &model->id)) {
        *err = "cannot open the model '" + settings.model + "'; check its path";
        return false;
    }
    std::shared_ptr<pinfer_model> old = pinfer_model_of(model->id);
    if (old && old->n_buffers > 0) {
        if (old->settings == model->settings) {
            old->released = false;
            return true;
        }
        *err = settings.model + " is in use with other settings in this process; close what uses it first";
        return false;
    }
    if (!read_files(model.get(), err)) {
        return false;
    }
    pinfer_model_release(model->id);
    old.reset(); // and with it its devices: never two at a time
    if (!open_devices(model.get(), err)) {
        return false;
    }
    open_trace(*model);
    pinfer_model_add(model);
    return true;
}

void pinfer_model_add(const std::shared_ptr<pinfer_model> & m) {
    registry &                  r = models();
    std::lock_guard<std::mutex> lock(r.mutex);
    m->order        = ++r.n_configured;
    r.models[m->id] = m;
    for (size_t i = 1; i < m->header.files.size(); i++) {
        pinfer_file_id part;
        if (pinfer_file_id_of(m->header.files[i].c_str(), &part)) {
            r.models[part] = m;
        }
    }
}

void pinfer_model_release(const pinfer_file_id & id) {
    std::shared_ptr<pinfer_model> gone; // is freed without the lock
    registry &                    r = models();
    std::lock_guard<std::mutex>   lock(r.mutex);
    const auto                    at = r.models.find(id);
    if (at == r.models.end()) {
        return;
    }
    gone           = at->second;
    gone->released = true;
    if (gone->n_buffers == 0) {
        std::erase_if(r.models, [&](const auto & entry) { return entry.second == gone; });
    }
}

std::shared_ptr<pinfer_model> pinfer_model_of(const pinfer_file_id & id) {
    registry &                  r = models();
    std::lock_guard<std::mutex> lock(r.mutex);
    const auto                  at = r.models.find(id);
    return at == r.models.end() ? nullptr : at->second;
}

std::shared_ptr<pinfer_model> pinfer_model_of(const char * path) {
    pinfer_file_id id;
    if (pinfer_file_id_of(path, &id)) {
        return pinfer_model_of(id);
    }
    for (const auto & m : pinfer_models()) { // the file may be gone, and still be in use
        if (path && m->settings.model == path) {
            return m;
        }
    }
    return nullptr;
}

std::vector<std::shared_ptr<pinfer_model>> pinfer_models() {
    registry &                                 r = models();
    std::lock_guard<std::mutex>                lock(r.mutex);
    std::vector<std::shared_ptr<pinfer_model>> out;
    for (const auto & [id, m] : r.models) {
        if (id == m->id) {
            out.push_back(m);
        }
    }
    return out;
}

void pinfer_model_fail(pinfer_model * m, const std::string & why) {
    m->failure = why;
    if (m->announce_fallback) {
        fprintf(stderr, "pinfer: %s\n", why.c_str());
    }
}

template <typename F> static void each_file(const pinfer_model * m, F && f) {
    if (m->predictor) {
        f(m->predictor->file);
    }
    if (m->cold) {
        f(m->cold->file);
    }
    for (const auto & hot : m->hot) {
        f(hot->file);
    }
}

const pinfer_artefact * pinfer_model_damaged_file(const pinfer_model * m) {
    const pinfer_artefact * damaged = nullptr;
    each_file(m, [&](const pinfer_artefact & file) { damaged = !damaged && file.verifier.is_damaged() ? &file : damaged; });
    return damaged;
}

void pinfer_model_begin_check(const pinfer_model * m) {
    each_file(m, [](pinfer_artefact & file) { file.verifier.begin(); });
}

void pinfer_model_finish_check(const pinfer_model * m) {
    const double seconds = 10.0;
    pinfer_model_begin_check(m);
    each_file(m, [&](const pinfer_artefact & file) {
        if (!file.verifier.wait(seconds)) {
            fprintf(stderr, "pinfer: %s was not checked to its end; to check it, type: pinfer show %s --verify\n", file.path.c_str(),
                    m->settings.model.c_str());
        } else if (file.verifier.is_damaged() && m->failure.empty()) {
            fprintf(stderr, "pinfer: the words above may be wrong: %s\n", pinfer_artefact_damage(&file).c_str());
        }
    });
}

// --- where its weights lie --------------------------------------------------------------------------------------------

void pinfer_model_place(pinfer_model * m, const ggml_tensor * weight) {
    int                         ffn  = -1;
    const pinfer_part           part = pinfer_part_of(weight->name, false, &ffn);
    std::lock_guard<std::mutex> lock(m->mutex);
    if (part != PINFER_PART_NONE && (size_t) ffn < m->ffns.size()) {
        m->ffns[(size_t) ffn].placed |= (uint8_t) (1u << part);
    }
}

static std::atomic<int> n_buffers_of_all{0};

bool pinfer_models_in_use() {
    return n_buffers_of_all > 0;
}

void pinfer_model_hold(pinfer_model * m) {
    m->n_buffers++;
    n_buffers_of_all++;
}

void pinfer_model_let_go(pinfer_model * m) {
    n_buffers_of_all--;
    if (--m->n_buffers > 0) {
        return;
    }
    std::lock_guard<std::mutex> lock(m->mutex);
    for (auto & ffn : m->ffns) {
        ffn = {};
    }
    m->biases.clear();
    if (m->released) {
        pinfer_model_release(m->id);
    }
}

int pinfer_model_missing_ffn(pinfer_model * m) {
    std::lock_guard<std::mutex> lock(m->mutex);
    for (size_t i = 0; i < m->ffns.size(); i++) {
        const pinfer_ffn_header & has  = m->header.ffns[i];
        const unsigned            gate = has.gate.ne[1] > 0 ? 1u << PINFER_PART_GATE : 0u;
        const unsigned            all  = gate | 1u << PINFER_PART_UP | 1u << PINFER_PART_DOWN;
        if (has.n_ff() > 0 && (m->ffns[i].placed & all) != all) {
            return (int) i;
        }
    }
    return -1;
}
