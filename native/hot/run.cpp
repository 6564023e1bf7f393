// run.cpp: one layer on a hot device: the graph, kept from call to call, and the ways to have it computed beside the CPU.
#include "device.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

// A hot FFN has at most 15 nodes and 9 leafs, and a stack two nodes more for each expert of a token.
static const size_t GRAPH_NODES = 32;

// Graphs kept of an FFN: decoding uses one over and over, and a device may have compiled it (CUDA does).
static const size_t GRAPHS_KEPT = 4;

static void fail(pinfer_hot * hot, const char * why) {
    snprintf(hot->failure, sizeof(hot->failure), "%s", why);
}

pinfer_hot_graph::~pinfer_hot_graph() {
    if (ctx) {
        ggml_free(ctx);
    }
}

static ggml_tensor * product(const pinfer_hot_graph & g, ggml_tensor * w, ggml_tensor * bias, ggml_tensor * x) {
    ggml_tensor * y = g.experts ? ggml_mul_mat_id(g.ctx, w, x, g.experts) : ggml_mul_mat(g.ctx, w, x);
    if (!bias) {
        return y;
    }
    return g.experts ? ggml_add_id(g.ctx, y, bias, g.experts) : ggml_add(g.ctx, y, bias);
}

// The sum over the experts of each token, times their weights.
static ggml_tensor * weighted_sum(const pinfer_hot_graph & g, ggml_tensor * y) {
    y                 = ggml_mul(g.ctx, y, g.weights);
    ggml_tensor * sum = nullptr;
    for (int64_t k = 0; k < g.n_used; k++) {
        ggml_tensor * const one = ggml_view_2d(g.ctx, y, y->ne[0], g.n_tokens, y->nb[2], (size_t) k * y->nb[1]);
        sum                     = sum ? ggml_add(g.ctx, sum, one) : one;
    }
    return g.n_used == 1 ? ggml_cont(g.ctx, sum) : sum;
}

// pinfer_relu() of v in operations that every device has. v - threshold is above zero exactly where v is above the
// threshold; after the ReLU no infinity meets the step's zero.
static ggml_tensor * relu(ggml_context * ctx, ggml_tensor * v, float threshold) {
    v = ggml_relu(ctx, v);
    return threshold > 0.0f ? ggml_mul(ctx, v, ggml_step(ctx, ggml_scale_bias(ctx, v, 1.0f, -threshold))) : v;
}

static void copy_params(const ggml_tensor * from, ggml_tensor * to) {
    if (from) {
        memcpy(to->op_params, from->op_params, sizeof(to->op_params));
    }
}

// f(x) of the layer's neurons.
static ggml_tensor * activation(const pinfer_hot_graph & g, const pinfer_hot_ffn & layer, const ggml_tensor * glu) {
    ggml_context * const ctx  = g.ctx;
    const pinfer_rule &  rule = g.rule;
    ggml_tensor *        h    = product(g, layer.up, layer.up_bias, g.x);
    if (rule.act == PINFER_ACT_OTHER) {
        h = ggml_swiglu_split(ctx, product(g, layer.gate, layer.gate_bias, g.x), h);
        copy_params(glu, h);
        return h;
    }
    if (rule.act != PINFER_ACT_REGLU && rule.act != PINFER_ACT_REGLU2) {
        h = relu(ctx, h, rule.threshold);
    }
    if (layer.gate) {
        ggml_tensor * gate = product(g, layer.gate, layer.gate_bias, g.x);
        if (rule.act == PINFER_ACT_REGLU2) {
            return ggml_mul(ctx, ggml_sqr(ctx, relu(ctx, gate, rule.threshold)), h);
        }
        return rule.threshold > 0.0f ? ggml_mul(ctx, relu(ctx, gate, rule.threshold), h) : ggml_reglu_split(ctx, gate, h);
    }
    return rule.act == PINFER_ACT_RELU2 ? ggml_sqr(ctx, h) : h;
}

// The graph of a job's FFN, without memory for its tensors.
static std::unique_ptr<pinfer_hot_graph> build(const pinfer_hot_ffn & layer, const pinfer_hot_job & job, int64_t n_tokens,
                                               int64_t n_used) {
    auto         g     = std::make_unique<pinfer_hot_graph>();
    const size_t nodes = GRAPH_NODES + 2 * (size_t) n_used;
    const size_t size  = ggml_tensor_overhead() * nodes + ggml_graph_overhead_custom(nodes, false);
    g->n_used          = n_used;
    g->rule           = job.rule;
    g->n_tokens       = n_tokens;
    g->memory         = std::make_unique<uint8_t[]>(size); // ggml's own allocation would abort
    g->ctx            = ggml_init({.mem_size = size, .mem_buffer = g->memory.get(), .no_alloc = true});
    ggml_context * const ctx = g->ctx;
    if (n_used) {
        g->x       = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layer.n_embd, 1, n_tokens);
        g->experts = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, n_tokens);
        g->weights = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_used, n_tokens);
        ggml_set_input(g->experts);
        ggml_set_input(g->weights);
    } else {
        g->x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layer.n_embd, n_tokens);
    }
    ggml_set_input(g->x);
    g->y = product(*g, layer.down, layer.down_bias, activation(*g, layer, job.glu));
    copy_params(job.down, layer.down_bias ? g->y->src[0] : g->y);
    g->y = n_used ? weighted_sum(*g, g->y) : g->y;
    ggml_set_output(g->y);
    g->graph = ggml_new_graph_custom(ctx, nodes, false);
    ggml_build_forward_expand(g->graph, g->y);
    return g;
}

// The first node that the device cannot compute; null: it can compute all.
static const ggml_tensor * unsupported(const pinfer_hot * hot, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        if (!ggml_backend_supports_op(hot->backend, ggml_graph_node(graph, i))) {
            return ggml_graph_node(graph, i);
        }
    }
    return nullptr;
}

bool pinfer_hot_reserve(pinfer_hot * hot, const pinfer_rule & rule, std::string * err) {
    err->clear();
    hot->galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(hot->backend));
    for (const pinfer_hot_ffn & layer : hot->ffns) {
        if (layer.n == 0) {
            continue;
        }
        const auto g = build(layer, {.rule = rule}, PINFER_HOT_TOKENS, layer.n_used);
        if (const ggml_tensor * node = unsupported(hot, g->graph)) {
            *err = "device " + hot->name + " cannot compute " + ggml_op_desc(node) + " of " + ggml_type_name(node->src[0]->type) +
                   "; choose another device with: pinfer solve --device, then pinfer split";
            return false;
        }
        if (!ggml_gallocr_reserve(hot->galloc, g->graph)) {
            return false;
        }
    }
    hot->compute_size = ggml_gallocr_get_buffer_size(hot->galloc, 0);
    return true;
}

// The graph of an FFN for a number of tokens, new or kept; null when the device has no room.
static pinfer_hot_graph * graph_get(pinfer_hot * hot, pinfer_hot_ffn & layer, int64_t n_tokens, int64_t n_used) {
    const pinfer_rule & rule = hot->job.rule;
    auto &     kept  = layer.graphs;
    const auto found = std::find_if(kept.begin(), kept.end(), [&](const auto & g) {
        return g->n_tokens == n_tokens && g->n_used == n_used && g->rule.act == rule.act && g->rule.threshold == rule.threshold;
    });
    if (found != kept.end()) {
        std::rotate(kept.begin(), found, found + 1);
        return kept.front().get();
    }
    auto g = build(layer, hot->job, n_tokens, n_used);
    if (!ggml_gallocr_alloc_graph(hot->galloc, g->graph)) {
        return nullptr;
    }
    const size_t size = ggml_gallocr_get_buffer_size(hot->galloc, 0);
    if (size != hot->compute_size) { // the buffer has moved, and with it the tensors of all other graphs
        hot->compute_size = size;
        for (pinfer_hot_ffn & other : hot->ffns) {
            other.graphs.clear();
        }
    }
    if (kept.size() == GRAPHS_KEPT) {
        ggml_backend_synchronize(hot->backend); // it may still be at work on the one that goes
        kept.pop_back();
    }
    kept.insert(kept.begin(), std::move(g));
    return kept.front().get();
}

// Room for x and y of a batch.
static void stage(pinfer_hot * hot, int64_t n_tokens, int64_t n_embd) {
    if (n_tokens * n_embd <= hot->n_staged) {
        return;
    }
    hot->n_staged  = 0; // while there is no room
    const size_t n = (size_t) (std::max<int64_t>(n_tokens, PINFER_HOT_TOKENS) * n_embd);
    if (hot->pinned) {
        ggml_backend_buffer_free(hot->pinned);
        hot->pinned = nullptr;
    }
    ggml_backend_buffer_type_t type = ggml_backend_dev_host_buffer_type(ggml_backend_get_device(hot->backend));
    if (type && hot->drive != PINFER_HOT_INLINE) {
        hot->pinned = ggml_backend_buft_alloc_buffer(type, 2 * n * sizeof(float));
    }
    if (hot->pinned) {
        hot->x = (float *) ggml_backend_buffer_get_base(hot->pinned);
        hot->y = hot->x + n;
    } else {
        hot->x = nullptr;
        hot->plain.resize(n);
        hot->y = hot->plain.data();
    }
    hot->n_staged = (int64_t) n;
}

// The experts of the job's tokens [from, from + n) that are here, n_used of each, behind those of the tokens before: who has
// fewer gets others of weight 0. Returns n_used; 0: none is here.
static int64_t place_experts(pinfer_hot * hot, const pinfer_hot_ffn & f, int64_t from, int64_t n) {
    const pinfer_routes & routes = *hot->job.routes;
    const auto            place  = [&](int64_t t, int64_t k) {
        const int32_t e = routes.experts[(size_t) ((from + t) * routes.n_used + k)];
        return e >= 0 && (size_t) e < f.place.size() ? f.place[(size_t) e] : -1;
    };
    int64_t n_used = 0;
    for (int64_t t = 0; t < n; t++) {
        int64_t here = 0;
        for (int64_t k = 0; k < routes.n_used; k++) {
            here += place(t, k) >= 0;
        }
        n_used = std::max(n_used, here);
    }
    for (int64_t t = 0; t < n; t++) {
        int64_t here = 0;
        for (int64_t k = 0; k < routes.n_used; k++) {
            if (place(t, k) >= 0) {
                hot->experts.push_back(place(t, k));
                hot->factors.push_back(routes.weights[(size_t) ((from + t) * routes.n_used + k)]);
                here++;
            }
        }
        for (int32_t other = 0; here < n_used; other++) { // not one that the token has: some devices sort them by expert
            const auto own = hot->experts.end() - here;
            if (std::find(own, hot->experts.end(), other) == hot->experts.end()) {
                hot->experts.push_back(other);
                hot->factors.push_back(0.0f);
                here++;
            }
        }
    }
    return n_used;
}

// Has the job computed, or queued where the device has a queue.
static void compute(pinfer_hot * hot) try {
    const pinfer_hot_job & job   = hot->job;
    const float * const    x     = hot->x ? hot->x : job.x;
    pinfer_hot_ffn &       layer = hot->ffns[(size_t) job.ffn];
    hot->experts.clear();
    hot->factors.clear();
    if (job.routes) { // what is queued must stay where it is
        hot->experts.reserve(job.routes->experts.size());
        hot->factors.reserve(job.routes->experts.size());
    }
    for (int64_t t = 0; t < job.n_tokens; t += PINFER_HOT_TOKENS) {
        const int64_t            n = std::min<int64_t>(PINFER_HOT_TOKENS, job.n_tokens - t);
        const size_t             placed = hot->experts.size();
        const int64_t            n_used = job.routes ? place_experts(hot, layer, t, n) : 0;
        if (job.routes && n_used == 0) {
            std::fill(hot->y + t * layer.n_embd, hot->y + (t + n) * layer.n_embd, 0.0f);
            continue;
        }
        const pinfer_hot_graph * g = graph_get(hot, layer, n, n_used);
        if (!g) {
            fail(hot, "out of memory");
            return;
        }
        ggml_backend_tensor_set_async(hot->backend, g->x, x + t * layer.n_embd, 0, ggml_nbytes(g->x));
        if (n_used) {
            ggml_backend_tensor_set_async(hot->backend, g->experts, hot->experts.data() + placed, 0, ggml_nbytes(g->experts));
            ggml_backend_tensor_set_async(hot->backend, g->weights, hot->factors.data() + placed, 0, ggml_nbytes(g->weights));
        }
        const ggml_status status = ggml_backend_graph_compute_async(hot->backend, g->graph);
        if (status != GGML_STATUS_SUCCESS) {
            fail(hot, ggml_status_to_string(status));
            return;
        }
        ggml_backend_tensor_get_async(hot->backend, g->y, hot->y + t * layer.n_embd, 0, ggml_nbytes(g->y));
    }
    if (hot->drive != PINFER_HOT_QUEUED) {
        ggml_backend_synchronize(hot->backend);
    }
} catch (const std::bad_alloc &) {
    fail(hot, "out of memory");
} catch (const std::exception & e) {
    fail(hot, e.what());
}

static void work(pinfer_hot * hot) {
    for (uint32_t seen = 0;; seen++) {
        hot->begun.wait(seen); // spins a moment, then sleeps
        if (hot->stop) {
            return;
        }
        hot->worked.begin = pinfer_clock();
        compute(hot);
        hot->worked.end = pinfer_clock();
        hot->done++;
        hot->done.notify_one();
    }
}

void pinfer_hot_start_thread(pinfer_hot * hot) {
    hot->thread = std::thread(work, hot);
}

void pinfer_hot_stop_thread(pinfer_hot * hot) {
    if (hot->thread.joinable()) {
        hot->stop = true;
        hot->begun++;
        hot->begun.notify_one();
        hot->thread.join();
    }
}

static void begin(pinfer_hot * hot) {
    const pinfer_hot_job & job = hot->job;
    const int64_t          n_embd = hot->ffns[(size_t) job.ffn].n_embd;
    stage(hot, job.n_tokens, n_embd);
    if (hot->x) {
        memcpy(hot->x, job.x, (size_t) (job.n_tokens * n_embd) * sizeof(float));
    }
    if (hot->drive == PINFER_HOT_THREADED) {
        hot->begun++;
        hot->begun.notify_one();
        hot->copied.end = pinfer_clock();
        return;
    }
    hot->worked.begin = pinfer_clock();
    compute(hot);
    hot->worked.end = pinfer_clock();
    hot->copied.end = hot->drive == PINFER_HOT_QUEUED ? hot->worked.end : hot->worked.begin;
}

void pinfer_hot_begin(pinfer_hot * hot, const pinfer_hot_job & job) noexcept {
    hot->copied.begin = pinfer_clock();
    hot->job          = job;
    hot->failure[0]   = '\0';
    hot->layer_in_flight = pinfer_ffn_layer(job.ffn);
    try {
        begin(hot);
    } catch (const std::exception &) {
        fail(hot, "out of memory");
    }
}

const float * pinfer_hot_end(pinfer_hot * hot) noexcept {
    if (hot->drive == PINFER_HOT_THREADED) {
        for (uint32_t done = hot->done; done != hot->begun; done = hot->done) {
            hot->done.wait(done);
        }
    } else if (hot->drive == PINFER_HOT_QUEUED) {
        try {
            ggml_backend_synchronize(hot->backend);
        } catch (const std::exception &) {
            fail(hot, "out of memory");
        }
        hot->worked.end = pinfer_clock();
    }
    hot->layer_in_flight = -1;
    return hot->failure[0] == '\0' ? hot->y : nullptr;
}
