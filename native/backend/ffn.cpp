// ffn.cpp: one matched FFN: sparse or dense, from the shards or from the model.
#include "ffn.h"

#include "sparse.h"

#include <cstring>

namespace {

// dst [n_tokens, n_embd] += the hot part, then the bias.
void add_rest(const pinfer_ffn & f, const float * hot) {
    const int64_t n_embd = f.down.out()->ne[0];
    const int64_t n      = ggml_nelements(f.down.out());
    const float * bias   = f.down.bias ? (const float *) f.down.bias->data : nullptr;
    float *       dst    = (float *) f.down.out()->data;
    for (int64_t k = 0; (hot || bias) && k < n; k++) {
        dst[k] += (hot ? hot[k] : 0.0f) + (bias ? bias[k % n_embd] : 0.0f);
    }
}

// x of the FFN, or a copy of it where the graph has given its memory to `out`, which is written while x is still read.
const float * x_beside(pinfer_engine * e, const ggml_tensor * x, const ggml_tensor * out) {
    const char * const data = (const char *) x->data, * const to = (const char *) out->data;
    if (data + ggml_nbytes(x) <= to || to + ggml_nbytes(out) <= data) {
        return (const float *) data;
    }
    e->x_copy.assign((const float *) data, (const float *) data + ggml_nelements(x));
    return e->x_copy.data();
}

// Behind shards only a long batch may read the model's own matrices; the FFN is not held in memory twice for it.
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

// Neurons lie in shards: cold ones here, hot ones on their device at the same time.
ggml_status compute_shards(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, pinfer_sparse_job & j) {
    const pinfer_hot_layer * hot = s->hot ? &s->hot->layers[(size_t) f.layer] : nullptr;
    const bool               any = hot && hot->n > 0;
    if (any && !pinfer_hot_begin(s->hot.get(), f.layer, j.rule, (const float *) f.x->data, j.n_tokens)) {
        return GGML_STATUS_FAILED;
    }
    j.x = x_beside(e, f.x, f.down.out());
    j.y = (float *) f.down.out()->data;
    if (j.neurons->n > 0) {
        count(s, pinfer_sparse_compute(e, j));
    } else {
        memset(j.y, 0, ggml_nbytes(f.down.out()));
    }
    if (any) {
        e->hot_y.resize((size_t) (j.n_tokens * j.n_embd));
        if (!pinfer_hot_end(s->hot.get(), e->hot_y.data(), j.n_tokens)) {
            return GGML_STATUS_FAILED;
        }
        s->stats.n_hot += (uint64_t) (hot->n * j.n_tokens);
    }
    add_rest(f, any ? e->hot_y.data() : nullptr);
    return GGML_STATUS_SUCCESS;
}

// Many tokens: nothing is predicted. Where all neurons are cold the shard has what is needed, and its down rows are the
// way to save what is zero; else the model's own matrices are used.
ggml_status compute_long_batch(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, const pinfer_neurons & cold,
                               const pinfer_rule & rule) {
    if (cold.n < f.h->ne[0]) {
        const ggml_status status = pinfer_dense_ffn(e, s, f, rule);
        release_weights(f);
        return status;
    }
    s->stats.n_tokens_dense += (uint64_t) f.x->ne[1];
    const ggml_status status = pinfer_dense_neurons(e, f, cold, rule, x_beside(e, f.x, f.down.out()));
    add_rest(f, nullptr);
    return status;
}

// No shards: down is multiplied whole, from an h that is zero where nothing fired.
ggml_status compute_model(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, pinfer_sparse_job & j) {
    j.x = x_beside(e, f.x, f.h);
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
    return cold ? compute_shards(e, s, f, j) : compute_model(e, s, f, j);
}
