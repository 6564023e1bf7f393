// engine.cpp: walks the nodes of a split: whole FFNs go to ffn.cpp, anything else to ggml's CPU backend, counted.
#include "plan.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstdio>

// A split is one FFN, some 10 nodes; more are sent on in portions.
static const size_t GRAPH_SIZE = 64;

bool pinfer_engine_init(pinfer_engine * e) {
    e->cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (!e->cpu) {
        return false;
    }
    e->graph_ctx = ggml_init({.mem_size   = ggml_graph_overhead_custom(GRAPH_SIZE, false) + ggml_tensor_overhead(),
                              .mem_buffer = nullptr,
                              .no_alloc   = true});
    e->graph     = ggml_new_graph_custom(e->graph_ctx, GRAPH_SIZE, false);
    pinfer_engine_set_n_threads(e, e->n_threads);
    return true;
}

void pinfer_engine_free(pinfer_engine * e) {
    if (e->graph_ctx) {
        ggml_free(e->graph_ctx);
    }
    if (e->cpu) {
        ggml_backend_free(e->cpu);
    }
}

void pinfer_engine_set_n_threads(pinfer_engine * e, int n_threads) {
    e->n_threads = n_threads;
    auto * set   = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_get_device(e->cpu)), "ggml_backend_set_n_threads");
    if (set) {
        set(e->cpu, n_threads);
    }
}

uint8_t * pinfer_engine_arena(pinfer_engine * e, size_t size) {
    if (e->arena.size() < size + 64) {
        e->arena.resize(size + 64);
    }
    return (uint8_t *) (((uintptr_t) e->arena.data() + 63) / 64 * 64);
}

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

// Layer whose activation this node is by libllama's naming ("ffn_swiglu-7"), -1: none.
static int named_layer(const ggml_tensor * t) {
    char what[16];
    int  layer = -1;
    return sscanf(t->name, "ffn_%15[a-z]-%d", what, &layer) == 2 ? layer : -1;
}

static void mark_done(pinfer_engine * e, int layer, const ggml_tensor * h) {
    if (e->activation_done.size() <= (size_t) layer) {
        e->activation_done.resize((size_t) layer + 1, nullptr);
    }
    e->activation_done[(size_t) layer] = h;
}

static bool is_relu(const ggml_tensor * t) {
    return t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_RELU;
}

// Whether the graph's own operations, taken as they are, end in h = act(...).
static bool graph_computes(const ggml_tensor * h, pinfer_activation act) {
    switch (act) {
        case PINFER_ACT_RELU:
            return is_relu(h);
        case PINFER_ACT_RELU2:
            return h->op == GGML_OP_SQR && is_relu(h->src[0]);
        case PINFER_ACT_REGLU:
            return (h->op == GGML_OP_GLU && ggml_get_glu_op(h) == GGML_GLU_OP_REGLU) ||
                   (h->op == GGML_OP_MUL && (is_relu(h->src[0]) || is_relu(h->src[1])));
        default:
            return false;
    }
}

// Whether h, which feeds the down product of a layer, is the model's activation: the graph's own, or computed here.
// With a threshold the graph's own is right only as far as the ReLU in it was computed here.
static bool is_models(const pinfer_engine * e, const pinfer_rule & rule, int layer, const ggml_tensor * h) {
    const ggml_tensor * const done = (size_t) layer < e->activation_done.size() ? e->activation_done[(size_t) layer] : nullptr;
    const bool                same = graph_computes(h, rule.act);
    if (h == done) {
        return same || !is_relu(h); // a ReLU may be but the inner step
    }
    return same && (rule.threshold == 0.0f || (done && (h->src[0] == done || h->src[1] == done)));
}

// Layer of an activation node that has to be computed by the model's rule instead of the graph's; -1: none such. Without
// a threshold a ReLU stays what it is: it is the whole of relu, and the inner step of the others.
static int replaced_activation(const ggml_tensor * node, const pinfer_rule & rule) {
    pinfer_ffn f;
    const bool thresholds    = rule.threshold > 0.0f;
    const bool is_activation = node->op == GGML_OP_GLU || (node->op == GGML_OP_UNARY && (thresholds || !is_relu(node))) ||
                               (node->op == GGML_OP_SQR && rule.act == PINFER_ACT_RELU);
    if (!is_activation || (!thresholds && graph_computes(node, rule.act))) {
        return -1;
    }
    return pinfer_match_activation(const_cast<ggml_tensor *>(node), &f) ? f.layer : named_layer(node);
}

// An activation node by the model's rule, from its sources.
static ggml_status compute_activation(pinfer_engine * e, const pinfer_rule & rule, ggml_tensor * node, int layer) {
    pinfer_ffn f;
    f.h            = node;
    f.up.mul_mat   = node->op == GGML_OP_GLU ? node->src[1] : node->src[0];
    f.gate.mul_mat = node->op == GGML_OP_GLU ? node->src[0] : nullptr;
    // the graph's own ReLU is the ReLU of any rule; what follows it stays the graph's
    const pinfer_rule own = is_relu(node) ? pinfer_rule{PINFER_ACT_RELU, rule.threshold} : rule;
    if (!f.up.mul_mat || pinfer_is_gated(own.act) != f.gated() || !ggml_is_contiguous(f.up.mul_mat) ||
        (f.gated() && !ggml_is_contiguous(f.gate.mul_mat))) {
        fprintf(stderr, "pinfer: %s cannot be computed as %s\n", node->name, pinfer_activation_name(rule.act));
        return GGML_STATUS_FAILED;
    }
    pinfer_dense_activation(e, f, own);
    mark_done(e, layer, node);
    return GGML_STATUS_SUCCESS;
}

// A node outside a whole FFN, computed from its direct sources: what lies before them may be overwritten by now. A down
// product whose input is not the model's activation is refused: it would be silently wrong.
static ggml_status compute_single(pinfer_engine * e, pinfer_state * s, ggml_tensor * node) {
    s->stats.n_fallback++;
    if (s->announce_fallback) {
        s->announce_fallback = false;
        fprintf(stderr, "pinfer: %s (%s) is no FFN pinfer knows; such nodes run on the plain CPU backend\n", node->name,
                ggml_op_desc(node));
    }
    if (s->rule.act == PINFER_ACT_GRAPH) {
        return pinfer_dense_nodes(e, &node, 1);
    }
    int layer = replaced_activation(node, s->rule);
    if (layer >= 0) {
        return compute_activation(e, s->rule, node, layer);
    }
    if (node->op == GGML_OP_MUL_MAT && pinfer_tensor_part(node->src[0], false, &layer) == PINFER_PART_DOWN &&
        !is_models(e, s->rule, layer, node->src[1])) {
        fprintf(stderr, "pinfer: the activation of layer %d was computed elsewhere, not as %s\n", layer,
                pinfer_activation_name(s->rule.act));
        return GGML_STATUS_FAILED;
    }
    return pinfer_dense_nodes(e, &node, 1);
}

// How a node of the split is dealt with: `ends` is the index into the FFN list it completes, -1: none.
struct plan_entry {
    bool inside = false;
    int  ends   = -1;
};

ggml_status pinfer_engine_compute(pinfer_engine * e, pinfer_state * s, ggml_cgraph * graph) {
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    const int      n     = ggml_graph_n_nodes(graph);

    std::vector<plan_entry> plan((size_t) n);
    std::vector<pinfer_ffn> ffns;
    for (int i = 0; i < n; i++) {
        pinfer_ffn f;
        if (nodes[i]->op != GGML_OP_MUL_MAT || !pinfer_match_ffn(nodes, n, i, &f)) {
            continue;
        }
        if (s->rule.act == PINFER_ACT_GRAPH ? f.graph_act == PINFER_ACT_OTHER : pinfer_is_gated(s->rule.act) != f.gated()) {
            continue; // no exact zeros: the CPU backend does it; or a rule for other FFNs, which is refused there
        }
        const ggml_tensor * members[] = {f.gate.mul_mat, f.gate.add, f.up.mul_mat, f.up.add, f.inner, f.h, f.down.mul_mat, f.down.add};
        for (int k = 0; k < n; k++) {
            if (std::find(std::begin(members), std::end(members), nodes[k]) != std::end(members)) {
                plan[(size_t) k].inside = true;
            }
            if (nodes[k] == f.down.out()) {
                plan[(size_t) k].ends = (int) ffns.size();
            }
        }
        ffns.push_back(f);
    }

    for (int i = 0; i < n; i++) {
        const plan_entry & p      = plan[(size_t) i];
        ggml_status        status = GGML_STATUS_SUCCESS;
        if (p.ends >= 0) {
            status = pinfer_ffn_compute(e, s, ffns[(size_t) p.ends]);
        } else if (!p.inside && !is_view(nodes[i])) {
            status = compute_single(e, s, nodes[i]);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}
