// ffn.cpp: one matched FFN: sparse or dense, from the shards or from the model.
#include "plan.h"

#include "sparse.h"

#include <algorithm>
#include <cstring>

namespace {

// Values that are added by one thread: to wake the others costs more.
const int64_t FEW_VALUES = 1 << 16;

// dst [n_tokens, n_embd] += the hot parts in the order of their devices, then the bias.
void add_rest(pinfer_engine * e, const pinfer_ffn & f) {
    const int64_t n_embd = f.down.out()->ne[0];
    const int64_t n      = ggml_nelements(f.down.out());
    const float * bias   = f.down.bias ? (const float *) f.down.bias->data : nullptr;
    float *       dst    = (float *) f.down.out()->data;
    if (e->hot_y.empty() && !bias) {
        return;
    }
#pragma omp parallel for num_threads(e->n_threads) schedule(static) if (n > FEW_VALUES)
    for (int64_t t = 0; t < n; t += n_embd) {
        for (const float * y : e->hot_y) {
            for (int64_t k = 0; k < n_embd; k++) {
                dst[t + k] += y[t + k];
            }
        }
        for (int64_t k = 0; bias && k < n_embd; k++) {
            dst[t + k] += bias[k];
        }
    }
}

bool is_beside(const ggml_tensor * x, const ggml_tensor * out) {
    const char * const data = (const char *) x->data, * const to = (const char *) out->data;
    return data + ggml_nbytes(x) <= to || to + ggml_nbytes(out) <= data;
}

// x of the FFN, or a copy of it where the graph has given its memory to what is written while x is still read: the output,
// and the activation where a device may read x so late.
const float * x_beside(pinfer_engine * e, const pinfer_ffn & f, const ggml_tensor * out, const ggml_tensor * h = nullptr) {
    const float * const data = (const float *) f.x->data;
    if (is_beside(f.x, out) && (!h || is_beside(f.x, h))) {
        return data;
    }
    e->x_copy.assign(data, data + ggml_nelements(f.x));
    return e->x_copy.data();
}

// Behind shards nothing reads the model's own matrices.
void release_weights(const pinfer_ffn & f) {
    for (const ggml_tensor * weight : {f.gate.weight, f.up.weight, f.down.weight}) {
        if (weight) {
            pinfer_release_weight(weight);
        }
    }
}

void count(pinfer_state * s, const pinfer_sparse_counts & c) {
    s->stats.n_candidates += c.candidates;
    s->stats.n_active += c.active;
}

// Sets the devices that have neurons of the layer to work.
void begin_hot(pinfer_engine * e, pinfer_state * s, const pinfer_hot_job & job) {
    e->hot_working.clear();
    e->hot_y.clear();
    for (const auto & hot : s->hot) {
        if (hot->layers[(size_t) job.layer].n > 0) {
            e->hot_working.push_back(hot.get());
        }
    }
    // a CPU device computes when it is begun: those that do not need these cores come first
    for (const bool here : {false, true}) {
        for (pinfer_hot * hot : e->hot_working) {
            if ((hot->drive == PINFER_HOT_INLINE) == here) {
                pinfer_hot_begin(hot, job);
            }
        }
    }
}

// Waits for all of them, also behind one that has failed: what they still write to stays theirs until they are done.
bool end_hot(pinfer_engine * e, pinfer_state * s) {
    bool ok = true;
    for (pinfer_hot * hot : e->hot_working) {
        const float * y = pinfer_hot_end(hot);
        if (!y && ok) {
            pinfer_state_fail(s, hot->failure);
            ok = false;
        }
        e->hot_y.push_back(y);
    }
    return ok;
}

// Adds the FFN to the counters and to the trace.
void account(const pinfer_engine * e, pinfer_state * s, const pinfer_span & cold, const pinfer_span & wait, const pinfer_hot_job & job) {
    pinfer_span hot;
    for (const pinfer_hot * device : e->hot_working) {
        const pinfer_span & w = device->worked;
        hot = hot.end > 0.0 ? pinfer_span{std::min(hot.begin, w.begin), std::max(hot.end, w.end)} : w;
        s->stats.seconds_copy += device->copied.seconds();
    }
    if (!e->hot_working.empty()) {
        s->stats.seconds_hot += hot.seconds();
        s->stats.seconds_cold += cold.seconds();
        s->stats.seconds_wait += wait.seconds();
        s->stats.seconds_overlap += std::max(0.0, std::min(hot.end, cold.end) - std::max(hot.begin, cold.begin));
    }
    if (!pinfer_trace_on()) {
        return;
    }
    for (size_t i = 0; i < s->hot.size(); i++) {
        const pinfer_hot & device = *s->hot[i];
        if (device.layers[(size_t) job.layer].n > 0) {
            pinfer_trace_add("copy", 0, device.copied, job.layer, job.n_tokens);
            pinfer_trace_add("hot", (int) i + 1, device.worked, job.layer, job.n_tokens);
        }
    }
    pinfer_trace_add("cold", 0, cold, job.layer, job.n_tokens);
    if (!e->hot_working.empty()) {
        pinfer_trace_add("wait", 0, wait, job.layer, job.n_tokens);
    }
    pinfer_trace_flush();
}

// Neurons lie in shards: cold ones are computed here (sparsely as `sparse` says, null: densely), hot ones on their devices at
// the same time. The sums meet in a fixed order.
ggml_status compute_shards(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, const pinfer_neurons & cold,
                           const pinfer_hot_job & job, const pinfer_sparse_job * sparse) {
    begin_hot(e, s, job);
    pinfer_span at_work, wait;
    ggml_status status = GGML_STATUS_SUCCESS;
    at_work.begin      = pinfer_clock();
    if (cold.n == 0) {
        memset(f.down.out()->data, 0, ggml_nbytes(f.down.out()));
    } else if (sparse) {
        count(s, pinfer_sparse_compute(e, *sparse));
    } else {
        status = pinfer_dense_neurons(e, f, cold, job.rule, job.x);
    }
    at_work.end = wait.begin = pinfer_clock();
    if (!end_hot(e, s)) {
        return GGML_STATUS_FAILED;
    }
    wait.end = pinfer_clock();
    add_rest(e, f);
    account(e, s, at_work, wait, job);
    return status;
}

// Few tokens: of the cold neurons only those that fire.
ggml_status compute_short_batch(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, pinfer_sparse_job & j) {
    j.x = x_beside(e, f, f.down.out());
    j.y = (float *) f.down.out()->data;
    const pinfer_hot_job job    = {.layer = f.layer, .rule = j.rule, .x = j.x, .n_tokens = j.n_tokens};
    const ggml_status    status = compute_shards(e, s, f, *j.neurons, job, &j);
    for (const pinfer_hot * hot : e->hot_working) {
        s->stats.n_hot += (uint64_t) (hot->layers[(size_t) f.layer].n * j.n_tokens);
    }
    return status;
}

// Many tokens: nothing is predicted. First products are whole, and the down rows of the cold shard are the way to save what
// is zero; the model's own matrices are not touched.
ggml_status compute_long_batch(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, const pinfer_neurons & cold,
                               const pinfer_rule & rule) {
    const pinfer_hot_job job = {
        .layer    = f.layer,
        .rule     = rule,
        .x        = x_beside(e, f, f.down.out(), s->hot.empty() ? nullptr : f.h),
        .n_tokens = f.x->ne[1],
    };
    s->stats.n_tokens_dense += (uint64_t) job.n_tokens;
    return compute_shards(e, s, f, cold, job, nullptr);
}

// No shards: down is multiplied whole, from an h that is zero where nothing fired.
ggml_status compute_model(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, pinfer_sparse_job & j) {
    j.x = x_beside(e, f, f.h);
    j.h = (float *) f.h->data;
    memset(j.h, 0, ggml_nbytes(f.h));
    count(s, pinfer_sparse_compute(e, j));
    return pinfer_dense_product(e, f.down, j.h);
}

} // namespace

ggml_status pinfer_ffn_compute(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f) {
    const pinfer_rule rule = s->rule.act == PINFER_ACT_GRAPH ? pinfer_rule{f.graph_act, 0.0f} : s->rule;
    const auto        il   = (size_t) f.layer;

    const pinfer_neurons *         cold = s->cold && il < s->cold->layers.size() ? &s->cold->layers[il] : nullptr;
    const pinfer_predictor_layer * pred = s->predictor && il < s->predictor->layers.size() ? &s->predictor->layers[il] : nullptr;
    if (pred && pred->rank == 0) {
        pred = nullptr;
    }
    if (cold && e->released.insert(f.layer).second) {
        release_weights(f); // the loader of libllama has read the whole file
    }
    const int64_t n_tokens = f.x->ne[1];
    // Without shards only an up row or a predictor can be saved; else whole products are as good and faster.
    const bool pays = cold || f.gated() || pred;
    if (s->observer.on || !pays) {
        return pinfer_dense_ffn(e, s, f, rule);
    }
    if (n_tokens >= s->n_batch_dense) {
        return cold ? compute_long_batch(e, s, f, *cold, rule) : pinfer_dense_ffn(e, s, f, rule);
    }

    pinfer_neurons own;
    if (!cold) {
        own.n    = f.up.weight->ne[1];
        own.gate = pinfer_model_rows(f.gate);
        own.up   = pinfer_model_rows(f.up);
        if (!own.up.kernel || (f.gated() && !own.gate.kernel)) {
            return pinfer_dense_ffn(e, s, f, rule);
        }
    }
    pinfer_sparse_job j;
    j.neurons   = cold ? cold : &own;
    j.predictor = pred;
    j.rule      = rule;
    j.gated     = f.gated();
    j.n_embd    = f.x->ne[0];
    j.n_ff      = f.h->ne[0];
    j.n_tokens  = n_tokens;

    s->stats.n_tokens += (uint64_t) n_tokens;
    s->stats.n_neurons += (uint64_t) (n_tokens * j.n_ff);
    return cold ? compute_short_batch(e, s, f, j) : compute_model(e, s, f, j);
}
