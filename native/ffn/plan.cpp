// plan.cpp: which way an FFN goes. A batch is short (only the neurons that fire are computed) or long (all of them, as whole
// products), and its neurons come from the model or from its shards.
#include "plan.h"

#include "dense.h"
#include "experts.h"
#include "sparse.h"
#include "trace.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <unistd.h>

namespace {

bool is_apart(const ggml_tensor * x, const ggml_tensor * out) {
    const char * const data = (const char *) x->data, * const to = (const char *) out->data;
    return data + ggml_nbytes(x) <= to || to + ggml_nbytes(out) <= data;
}

// x of the FFN, or a copy of it where the graph has given its memory to what is written while x is still read: the output,
// and the activation where a device may read x so late.
const float * x_apart(pinfer_team * team, const pinfer_ffn & f, const ggml_tensor * out, const ggml_tensor * h = nullptr) {
    const float * const data = (const float *) f.x->data;
    if (is_apart(f.x, out) && (!h || is_apart(f.x, h))) {
        return data;
    }
    team->x_copy.assign(data, data + ggml_nelements(f.x));
    return team->x_copy.data();
}

void count(pinfer_model * m, const pinfer_sparse_counts & c) {
    m->stats.n_candidates += c.candidates;
    m->stats.n_active += c.active;
}

// The part of an FFN that the hot devices compute. Whatever happens after it has begun, an exception too, it ends before its
// owner does: the devices read x and write to their buffers until they are done.
class hot_part {
public:
    hot_part(pinfer_model * m, const pinfer_hot_job & job) : model(m), job(job) {
        // a CPU device computes when it is begun: those that do not need these cores come first
        for (const bool here : {false, true}) {
            each([&](pinfer_hot & hot) {
                if ((hot.drive == PINFER_HOT_INLINE) == here) {
                    pinfer_hot_begin(&hot, job);
                }
            });
        }
        running = true;
    }

    ~hot_part() { end(); }
    hot_part(const hot_part &) = delete;
    hot_part & operator=(const hot_part &) = delete;

    // Waits for all devices, also behind one that has failed, which it returns.
    const pinfer_hot * end() {
        const pinfer_hot * failed = nullptr;
        if (running) {
            each([&](pinfer_hot & hot) {
                if (!pinfer_hot_end(&hot) && !failed) {
                    failed = &hot;
                }
            });
        }
        running = false;
        return failed;
    }

    // The devices that have neurons of the layer, in the order in which their sums are added.
    template <typename F> void each(F && f) const {
        for (const auto & hot : model->hot) {
            if (hot->ffns[(size_t) job.ffn].n > 0) {
                f(*hot);
            }
        }
    }

private:
    pinfer_model *         model;
    const pinfer_hot_job & job;
    bool                   running = false;
};

// dst [n_tokens, n_embd] += the hot parts in the order of their devices, then the bias.
void add_rest(const pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, const hot_part & hot) {
    const int64_t n_embd = f.out()->ne[0], n_tokens = f.n_tokens();
    float *       dst    = (float *) f.out()->data;
    hot.each([&](const pinfer_hot & device) {
        const float * y = device.y;
        const int64_t n = n_embd * n_tokens;
#pragma omp parallel for num_threads(team->n_threads) schedule(static) if (n > (1 << 16)) // to wake the others costs more
        for (int64_t k = 0; k < n; k++) {
            dst[k] += y[k];
        }
    });
    const float * const bias = f.is_stack() ? nullptr : pinfer_dense_bias(m, f.down.bias); // experts have added their own
    if (bias) {
        pinfer_dense_add(team, dst, bias, n_embd, n_tokens, dst);
    }
}

// Adds the FFN to the counters and to the trace.
void account(pinfer_model * m, const pinfer_span & cold, const pinfer_span & wait, const pinfer_hot_job & job, const hot_part & part) {
    pinfer_span hot;
    part.each([&](const pinfer_hot & device) {
        const pinfer_span & w = device.worked;
        hot = hot.end > 0.0 ? pinfer_span{std::min(hot.begin, w.begin), std::max(hot.end, w.end)} : w;
        m->stats.seconds_copy += device.copied.seconds();
    });
    const bool any_hot = hot.end > 0.0;
    if (any_hot) {
        m->stats.seconds_hot += hot.seconds();
        m->stats.seconds_cold += cold.seconds();
        m->stats.seconds_wait += wait.seconds();
        m->stats.seconds_overlap += std::max(0.0, std::min(hot.end, cold.end) - std::max(hot.begin, cold.begin));
    }
    if (!pinfer_trace_on()) {
        return;
    }
    std::vector<pinfer_trace_event> events;
    for (size_t i = 0; i < m->hot.size(); i++) {
        const pinfer_hot & device = *m->hot[i];
        if (device.ffns[(size_t) job.ffn].n > 0) {
            events.push_back({"copy", 0, device.copied});
            events.push_back({"hot", (int) i + 1, device.worked});
        }
    }
    events.push_back({"cold", 0, cold});
    if (any_hot) {
        events.push_back({"wait", 0, wait});
    }
    pinfer_trace_add(events, pinfer_ffn_layer(job.ffn), job.n_tokens);
}

// Neurons lie in shards: `cold` computes its own here, into the output, hot ones are computed on their devices at the same time.
// The sums meet in a fixed order.
ggml_status compute_shards(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, const pinfer_hot_job & job,
                           const std::function<ggml_status()> & cold) {
    hot_part    hot(m, job);
    pinfer_span at_work, wait;
    at_work.begin            = pinfer_clock();
    const ggml_status status = cold();
    at_work.end = wait.begin = pinfer_clock();
    if (const pinfer_hot * failed = hot.end()) {
        pinfer_model_fail(m, "device " + failed->name + " failed in " + pinfer_ffn_title(job.ffn) + " (" + failed->failure + ")");
        return GGML_STATUS_FAILED;
    }
    wait.end = pinfer_clock();
    add_rest(team, m, f, hot);
    account(m, at_work, wait, job, hot);
    return status;
}

ggml_status nothing_cold(const pinfer_ffn & f) {
    memset(f.out()->data, 0, ggml_nbytes(f.out()));
    return GGML_STATUS_SUCCESS;
}

// Of the cold neurons those that fire.
ggml_status cold_sparsely(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, const pinfer_sparse_job & j) {
    if (j.neurons->n == 0) {
        return nothing_cold(f);
    }
    const pinfer_sparse_counts counts = pinfer_sparse_compute(team, j);
    if (j.n_tokens < m->settings.n_batch_dense) {
        count(m, counts);
    }
    return GGML_STATUS_SUCCESS;
}

ggml_status short_batch_of_shards(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, pinfer_sparse_job & j) {
    j.x = x_apart(team, f, f.down.out());
    j.y = (float *) f.down.out()->data;
    const pinfer_hot_job job    = {.ffn = f.index, .rule = j.rule, .x = j.x, .n_tokens = j.n_tokens};
    const ggml_status    status = compute_shards(team, m, f, job, [&] { return cold_sparsely(team, m, f, j); });
    for (const auto & hot : m->hot) {
        m->stats.n_hot += (uint64_t) (hot->ffns[(size_t) f.index].n * j.n_tokens);
    }
    return status;
}

// Nothing is predicted. First products are whole, and the down rows of the cold shard are the way to save what is zero; the
// model's own matrices are not touched.
ggml_status long_batch_of_shards(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, const pinfer_neurons & cold,
                                 const pinfer_rule & rule) {
    const pinfer_hot_job job = {
        .ffn      = f.index,
        .rule     = rule,
        .x        = x_apart(team, f, f.down.out(), m->hot.empty() ? nullptr : f.h),
        .n_tokens = f.n_tokens(),
    };
    m->stats.n_tokens_dense += (uint64_t) job.n_tokens;
    return compute_shards(team, m, f, job, [&] {
        return cold.n == 0 ? nothing_cold(f) : pinfer_dense_neurons(team, f, cold, rule, job.x);
    });
}

// Of a stack: cold experts are computed here, only what fires of them, whatever the length of the batch.
ggml_status batch_of_stack(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, pinfer_sparse_job & j) {
    const pinfer_routes  routes = pinfer_routes_of(f);
    const pinfer_hot_job job    = {.ffn = f.index, .rule = j.rule, .x = j.x, .n_tokens = j.n_tokens, .routes = &routes};
    j.routes                    = &routes;
    j.y                         = (float *) f.out()->data;
    const ggml_status status    = compute_shards(team, m, f, job, [&] { return cold_sparsely(team, m, f, j); });
    if (j.n_tokens < m->settings.n_batch_dense) {
        uint64_t n_hot = 0;
        for (const int32_t e : routes.experts) {
            n_hot += j.neurons->n == 0 || j.neurons->place[(size_t) e] < 0;
        }
        m->stats.n_tokens += (uint64_t) j.n_tokens;
        m->stats.n_neurons += (uint64_t) (j.n_tokens * routes.n_used * j.n_ff);
        m->stats.n_hot += n_hot * (uint64_t) j.n_ff;
    } else {
        m->stats.n_tokens_dense += (uint64_t) j.n_tokens;
    }
    return status;
}

// Of a stack without exact zeros: whole experts, here by llama.cpp's own products.
ggml_status batch_of_experts(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f) {
    const pinfer_routes routes = pinfer_routes_of(f);
    const int64_t       n_tokens = f.n_tokens(), n_ff = f.h->ne[0];
    const float * const x = (const float *) f.x->data;
    team->x_copy.assign(x, x + ggml_nelements(f.x)); // the graph has given its memory to others while devices still read it
    const pinfer_hot_job job = {.ffn = f.index, .rule = m->rule(), .x = team->x_copy.data(), .n_tokens = n_tokens, .routes = &routes,
                                .glu = f.h, .down = f.down.mul_mat};
    uint64_t             n_cold = 0;
    const ggml_status    status = compute_shards(team, m, f, job, [&] {
        return pinfer_experts_compute(team, *m, f, routes, job.x, &n_cold);
    });
    if (n_tokens >= m->settings.n_batch_dense) {
        m->stats.n_tokens_dense += (uint64_t) n_tokens;
        return status;
    }
    const uint64_t n = (uint64_t) (n_tokens * routes.n_used);
    m->stats.n_tokens += (uint64_t) n_tokens;
    m->stats.n_neurons += n * (uint64_t) n_ff;
    m->stats.n_candidates += n_cold * (uint64_t) n_ff;
    m->stats.n_active += n_cold * (uint64_t) n_ff;
    m->stats.n_hot += (n - n_cold) * (uint64_t) n_ff;
    return status;
}

// down is multiplied whole, from an h that is zero where nothing fired.
ggml_status short_batch_of_model(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, pinfer_sparse_job & j) {
    j.x = x_apart(team, f, f.h);
    j.h = (float *) f.h->data;
    memset(j.h, 0, ggml_nbytes(f.h));
    count(m, pinfer_sparse_compute(team, j));
    return pinfer_dense_product(team, m, f.down, j.h);
}

// --- the graph's FFN, the model's and the shards' must be the same -----------------------------------------------------

bool same_matrix(const pinfer_product & p, const pinfer_matrix & header) {
    if (!p.mul_mat) {
        return header.ne[1] == 0;
    }
    const int64_t n_rows = p.weight->ne[1] * p.weight->ne[2];
    return header.is(p.weight) && (!p.bias || (ggml_nelements(p.bias) == n_rows && ggml_is_contiguous(p.bias)));
}

// Some rows of a shard against those of the matrix that they were taken from.
bool same_rows(const pinfer_product & p, ggml_type type, const uint8_t * rows, const int32_t * ids, int64_t n) {
    const size_t row = ggml_row_size(p.weight->type, p.weight->ne[0]);
    for (const int64_t j : {(int64_t) 0, n / 2, n - 1}) {
        if (type != p.weight->type ||
            memcmp(rows + (size_t) j * row, (const char *) p.weight->data + (size_t) ids[j] * p.weight->nb[1], row) != 0) {
            return false;
        }
    }
    return true;
}

bool is_of(const pinfer_neurons & cold, const pinfer_ffn & f) {
    if (f.is_stack()) {
        return true; // it copies no rows
    }
    const auto same = [&](const pinfer_product & p, const pinfer_rows & rows) {
        return (rows.bias != nullptr) == (p.bias != nullptr) && same_rows(p, rows.kernel->type, rows.data, cold.ids, cold.n);
    };
    return cold.n == 0 || (same(f.up, cold.up) && (!f.gated() || same(f.gate, cold.gate)));
}

bool is_of(const pinfer_hot & hot, const pinfer_ffn & f) {
    const pinfer_hot_ffn & layer = hot.ffns[(size_t) f.index];
    const auto               same  = [&](const pinfer_product & p, const ggml_tensor * t, const ggml_tensor * bias) {
        pinfer_blob blob;
        std::string ignored;
        if (f.is_stack()) { // the first row of each expert
            const size_t row = t->nb[1];
            bool same = pinfer_artefact_tensor(&hot.file, t->name, t->type, t->ne[0], t->ne[1], &blob, &ignored, t->ne[2]) &&
                        t->type == p.weight->type;
            for (int64_t j = 0; same && j < layer.n; j++) {
                same = memcmp(blob.data + (size_t) j * t->nb[2], (const char *) p.weight->data + (size_t) layer.ids[j] * p.weight->nb[2],
                              row) == 0;
            }
            return same;
        }
        return (bias != nullptr) == (p.bias != nullptr) &&
               pinfer_artefact_tensor(&hot.file, t->name, t->type, t->ne[0], t->ne[1], &blob, &ignored) &&
               same_rows(p, t->type, blob.data, layer.ids, layer.n);
    };
    return layer.n == 0 || (same(f.up, layer.up, layer.up_bias) && (!f.gated() || same(f.gate, layer.gate, layer.gate_bias)));
}

// Whether a row of the weight in memory is that of the model's file. Models of one shape that are read into memory at the same
// time, and not mapped, could be taken for each other.
bool is_of_file(const pinfer_model & m, const pinfer_product & p, const pinfer_matrix & header) {
    const pinfer_own_file file(m.header.files[header.file].c_str());
    if (file.fd < 0) {
        return true; // moved away since
    }
    const size_t         row = ggml_row_size(p.weight->type, p.weight->ne[0]), at = (size_t) (p.weight->ne[1] / 2) * row;
    std::vector<uint8_t> of_file(row);
    const ssize_t        got = pread(file.fd, of_file.data(), row, (off_t) (header.offset + at));
    return got == (ssize_t) row && memcmp(of_file.data(), (const uint8_t *) p.weight->data + at, row) == 0;
}

// Whether f is what the model's header says, whenever it is computed, and what the shards hold, when it is computed first.
bool check_ffn(pinfer_model * m, const pinfer_ffn & f) {
    const auto        ffn   = (size_t) f.index;
    const std::string layer = pinfer_ffn_title(f.index);
    if (ffn >= m->ffns.size() || !same_matrix(f.gate, m->header.ffns[ffn].gate) || !same_matrix(f.up, m->header.ffns[ffn].up) ||
        (!f.is_half() && !same_matrix(f.down, m->header.ffns[ffn].down))) {
        pinfer_model_fail(m, "the FFN of " + layer + " in the graph is not that of " + m->settings.model +
                                 "; load the model that was configured");
        return false;
    }
    if (const pinfer_artefact * file = pinfer_model_damaged_file(m)) {
        pinfer_model_fail(m, pinfer_artefact_damage(file));
        return false;
    }
    if (m->ffns[ffn].checked) {
        pinfer_model_begin_check(m); // the first batch is through: from now on it delays no load
        return true;
    }
    if (!is_of_file(*m, f.up, m->header.ffns[ffn].up)) {
        pinfer_model_fail(m, "the weights of " + layer + " are not those of " + m->settings.model +
                                 "; load models of the same shape one after the other");
        return false;
    }
    const pinfer_artefact * other = m->cold && !is_of(m->cold->ffns[ffn], f) ? &m->cold->file : nullptr;
    for (const auto & hot : m->hot) {
        other = !other && !is_of(*hot, f) ? &hot->file : other;
    }
    if (other) {
        pinfer_model_fail(m, other->path + " does not hold the neurons of " + layer + " of the model" + other->remake);
        return false;
    }
    m->ffns[ffn].checked = true;
    return true;
}

// The same for a stack that lies elsewhere. Its graph is that of another model where it differs, which is left to it.
bool check_experts(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, bool * differs) {
    const auto ffn = (size_t) f.index;
    if (const pinfer_artefact * file = pinfer_model_damaged_file(m)) {
        pinfer_model_fail(m, pinfer_artefact_damage(file));
        return false;
    }
    if (m->ffns[ffn].proven == f.down.weight->data) {
        pinfer_model_begin_check(m);
        return true;
    }
    *differs = !same_matrix(f.gate, m->header.ffns[ffn].gate) || !same_matrix(f.up, m->header.ffns[ffn].up) ||
               !same_matrix(f.down, m->header.ffns[ffn].down) || !pinfer_experts_are_of(team, *m, f);
    m->ffns[ffn].proven = *differs ? nullptr : f.down.weight->data;
    return true;
}

// The neurons that the CPU computes of an FFN: the shard's, with rows of the model's own where the shard has none.
// Null: there is no kernel for the model's rows. own has to outlive the answer.
const pinfer_neurons * neurons_here(pinfer_model * m, const pinfer_ffn & f, const pinfer_neurons * cold, pinfer_neurons * own) {
    if (cold && !f.is_stack() && !f.is_half()) {
        return cold;
    }
    if (cold) {
        *own = *cold;
    } else {
        own->n = f.up.weight->ne[1];
    }
    if (cold && f.is_half()) {
        own->down = {};
        return own;
    }
    own->gate = pinfer_model_rows(m, f.gate);
    own->up   = pinfer_model_rows(m, f.up);
    return own->up.kernel && (!f.gated() || own->gate.kernel) ? own : nullptr;
}

} // namespace

static void set_threads(const pinfer_team * team, pinfer_model * m) {
    for (const auto & hot : m->hot) {
        pinfer_hot_set_n_threads(hot.get(), team->n_threads);
    }
}

static ggml_status compute_experts(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f) {
    bool differs = false;
    if (!check_experts(team, m, f, &differs)) {
        return GGML_STATUS_FAILED;
    }
    if (!differs) {
        set_threads(team, m);
        return batch_of_experts(team, m, f);
    }
    std::vector<ggml_tensor *> nodes = {f.up.mul_mat, f.up.add,       f.gate.mul_mat, f.gate.add,
                                        f.h,          f.down.mul_mat, f.down.add,     f.weighted};
    nodes.insert(nodes.end(), f.sums.begin(), f.sums.end());
    m->stats.n_fallback += nodes.size() - (size_t) std::count(nodes.begin(), nodes.end(), nullptr);
    return pinfer_team_nodes(team, nodes.data(), (int) nodes.size());
}

ggml_status pinfer_ffn_compute(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f) {
    if (m->rule().act == PINFER_ACT_OTHER) {
        return compute_experts(team, m, f);
    }
    if (!check_ffn(m, f)) {
        return GGML_STATUS_FAILED;
    }
    const pinfer_rule rule = m->rule().act == PINFER_ACT_GRAPH ? pinfer_rule{f.graph_act, 0.0f} : m->rule();
    const auto        ffn  = (size_t) f.index;
    set_threads(team, m);

    // where another node reads h, all of h has to be there
    const pinfer_neurons *         cold = m->cold && !f.h_is_read ? &m->cold->ffns[ffn] : nullptr;
    if (f.is_half() && cold && cold->n < f.up.weight->ne[1]) {
        pinfer_model_fail(m, "neurons of " + m->settings.model + " cannot be on a device: a norm follows their activation; type: "
                             "pinfer solve --vram 0, then pinfer split");
        return GGML_STATUS_FAILED;
    }
    const pinfer_predictor_ffn * pred = m->predictor ? &m->predictor->ffns[ffn] : nullptr;
    if (pred && (pred->rank == 0 || (m->cold && !cold))) {
        pred = nullptr; // it is arranged for the neurons of the shard
    }
    const int64_t n_tokens = f.n_tokens();
    // Without shards only an up row or a predictor can be saved; else whole products are as good and faster.
    const bool pays = cold || ((f.gated() || pred) && !f.is_stack());
    if (m->observer.on || !pays) {
        return pinfer_dense_ffn(team, m, f, rule);
    }
    if (n_tokens >= m->settings.n_batch_dense && !f.is_stack()) {
        return cold && !f.is_half() ? long_batch_of_shards(team, m, f, *cold, rule) : pinfer_dense_ffn(team, m, f, rule);
    }

    pinfer_neurons               own;
    const pinfer_neurons * const neurons = neurons_here(m, f, cold, &own);
    if (!neurons) {
        return pinfer_dense_ffn(team, m, f, rule);
    }
    pinfer_sparse_job j;
    j.neurons   = neurons;
    j.predictor = n_tokens < m->settings.n_batch_dense ? pred : nullptr;
    j.rule      = rule;
    j.gated     = f.gated();
    j.n_embd    = f.x->ne[0];
    j.n_ff      = f.h->ne[0];
    j.n_tokens  = n_tokens;
    if (f.is_stack()) {
        j.x = x_apart(team, f, f.out());
        return batch_of_stack(team, m, f, j);
    }
    m->stats.n_tokens += (uint64_t) n_tokens;
    m->stats.n_neurons += (uint64_t) (n_tokens * j.n_ff);
    return cold && !f.is_half() ? short_batch_of_shards(team, m, f, j) : short_batch_of_model(team, m, f, j);
}
