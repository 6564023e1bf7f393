// dense.cpp: the dense ways: products by ggml's CPU backend on the graph's own nodes, the activation by the model's rule.
#include "ffn.h"

#include <algorithm>

ggml_status pinfer_dense_nodes(pinfer_engine * e, ggml_tensor * const * nodes, int n) {
    ggml_graph_clear(e->graph);
    int queued = 0;
    for (int i = 0; i < n; i++) {
        if (nodes[i]) {
            ggml_graph_add_node(e->graph, nodes[i]);
            queued++;
        }
    }
    return queued ? ggml_backend_graph_compute(e->cpu, e->graph) : GGML_STATUS_SUCCESS;
}

static inline float relu(float v) {
    return v > 0.0f ? v : 0.0f;
}

// One value of h from the gate (or, ungated, the only) product g and the up product u.
static inline float activate(pinfer_activation act, float g, float u) {
    switch (act) {
        case PINFER_ACT_RELU2:
            return relu(g) * relu(g);
        case PINFER_ACT_REGLU:
            return relu(g) * u;
        case PINFER_ACT_DRELU:
            return relu(g) * relu(u);
        default:
            return relu(g);
    }
}

void pinfer_dense_activation(const pinfer_engine * e, const pinfer_ffn & f, pinfer_activation act) {
    const float *  up   = (const float *) f.up.out()->data;
    const float *  gate = f.gated() ? (const float *) f.gate.out()->data : up;
    float *        h    = (float *) f.h->data;
    const int64_t  n    = ggml_nelements(f.h);
#pragma omp parallel for num_threads(e->n_threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        h[i] = activate(act, gate[i], up[i]);
    }
}

// Tokens and neurons of a decode step that had to be dense (no shards): the report still wants to know what fired.
static void count_active(pinfer_state * s, const pinfer_ffn & f) {
    const float * h = (const float *) f.h->data;
    const int64_t n = ggml_nelements(f.h);
    s->stats.n_tokens += (uint64_t) f.h->ne[1];
    s->stats.n_neurons += (uint64_t) n;
    s->stats.n_candidates += (uint64_t) n;
    s->stats.n_active += (uint64_t) (n - std::count(h, h + n, 0.0f));
}

ggml_status pinfer_dense_ffn(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, pinfer_activation act) {
    ggml_tensor * first[] = {f.gate.mul_mat, f.gate.add, f.up.mul_mat, f.up.add};
    ggml_tensor * last[]  = {f.down.mul_mat, f.down.add};
    ggml_status   status  = pinfer_dense_nodes(e, first, 4);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    // x may be gone once the nodes below are computed: the allocator reuses memory in graph order
    pinfer_dense_activation(e, f, act);
    if (s->observer.on) {
        pinfer_observer_add(&s->observer, f.layer, (const float *) f.x->data, (const float *) f.h->data, f.x->ne[0],
                            f.h->ne[0], f.x->ne[1], e->n_threads);
    }
    if (f.h->ne[1] < s->n_batch_dense) {
        count_active(s, f);
    } else {
        s->stats.n_tokens_dense += (uint64_t) f.h->ne[1];
    }
    return pinfer_dense_nodes(e, last, 2);
}
