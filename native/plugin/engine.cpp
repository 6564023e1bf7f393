// engine.cpp: walks the nodes of a split: whole FFNs go to ffn/, anything else to ggml's CPU backend, counted.
#include "engine.h"

#include "buffer.h"
#include "dense.h"
#include "ggml-impl.h"
#include "match.h"
#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

static void mark_done(pinfer_engine * e, int ffn, const ggml_tensor * h) {
    if (e->activation_done.size() <= (size_t) ffn) {
        e->activation_done.resize((size_t) ffn + 1, nullptr);
    }
    e->activation_done[(size_t) ffn] = h;
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

// Whether h, which feeds the down product of an FFN, is the model's activation: the graph's own, or computed here.
// With a threshold the graph's own is right only as far as the ReLU in it was computed here.
static bool is_models(const pinfer_engine * e, const pinfer_rule & rule, int ffn, const ggml_tensor * h) {
    if (h->op == GGML_OP_MUL && h->src[0]->op == GGML_OP_RMS_NORM) { // a norm between them
        h = h->src[0]->src[0];
    }
    const ggml_tensor * const done = (size_t) ffn < e->activation_done.size() ? e->activation_done[(size_t) ffn] : nullptr;
    const bool                same = graph_computes(h, rule.act);
    if (h == done) {
        return same || !is_relu(h); // a ReLU may be but the inner step
    }
    return same && (rule.threshold == 0.0f || (done && (h->src[0] == done || h->src[1] == done)));
}

// FFN of an activation node that has to be computed by the model's rule instead of the graph's; -1: none such. Without
// a threshold a ReLU stays what it is: it is the whole of relu, and the inner step of the others.
static int replaced_activation(const ggml_tensor * node, const pinfer_rule & rule) {
    pinfer_ffn f;
    const bool thresholds    = rule.threshold > 0.0f;
    const bool is_activation = node->op == GGML_OP_GLU || (node->op == GGML_OP_UNARY && (thresholds || !is_relu(node))) ||
                               (node->op == GGML_OP_SQR && rule.act == PINFER_ACT_RELU);
    if (!is_activation || (!thresholds && graph_computes(node, rule.act))) {
        return -1;
    }
    if (pinfer_match_activation(const_cast<ggml_tensor *>(node), &f)) {
        return f.index;
    }
    const ggml_tensor * const weight = pinfer_match_claim(node).weight; // behind an adapter
    int                       ffn    = -1;
    return weight && pinfer_part_of(weight->name, false, &ffn) != PINFER_PART_NONE ? ffn : -1;
}

// An activation node by the model's rule, from its sources.
static ggml_status compute_activation(pinfer_engine * e, pinfer_model * m, ggml_tensor * node, int ffn) {
    const pinfer_rule & rule = m->rule();
    pinfer_ffn f;
    f.h            = node;
    f.up.mul_mat   = node->op == GGML_OP_GLU ? node->src[1] : node->src[0];
    f.gate.mul_mat = node->op == GGML_OP_GLU ? node->src[0] : nullptr;
    // the graph's own ReLU is the ReLU of any rule; what follows it stays the graph's
    const pinfer_rule own = is_relu(node) ? pinfer_rule{PINFER_ACT_RELU, rule.threshold} : rule;
    if (!f.up.mul_mat || pinfer_is_gated(own.act) != f.gated() || !ggml_is_contiguous(f.up.mul_mat) ||
        (f.gated() && !ggml_is_contiguous(f.gate.mul_mat))) {
        pinfer_model_fail(m, std::string(node->name) + " cannot be computed as " + pinfer_activation_name(rule.act) +
                                 "; check the activation that is named for " + m->settings.model);
        return GGML_STATUS_FAILED;
    }
    pinfer_dense_activation(&e->team, f, own);
    mark_done(e, ffn, node);
    return GGML_STATUS_SUCCESS;
}

// A bias by its type: ggml adds F32 alone.
static ggml_status compute_bias(pinfer_engine * e, pinfer_model * m, ggml_tensor * node) {
    const float * const bias = pinfer_dense_bias(m, node->src[1]);
    pinfer_dense_add(&e->team, (const float *) node->src[0]->data, bias, node->ne[0], ggml_nrows(node), (float *) node->data);
    return GGML_STATUS_SUCCESS;
}

static bool has_norm(const pinfer_model & m, int ffn) {
    return (size_t) ffn < m.header.ffns.size() && m.header.ffns[(size_t) ffn].normed;
}

static ggml_status refuse_activation(pinfer_model * m, int ffn) {
    pinfer_model_fail(m, "the activation of " + pinfer_ffn_title(ffn) + " was computed elsewhere, not as " +
                             pinfer_activation_name(m->rule().act) + "; keep all FFNs in the plugin's buffers");
    return GGML_STATUS_FAILED;
}

// The down product of an FFN whose first half went before: what was zero there is zero behind the norm as well.
static ggml_status compute_second_half(pinfer_engine * e, pinfer_model * m, ggml_tensor * node, int ffn) {
    const ggml_tensor * const h        = node->src[1];
    const int64_t             n_tokens = ggml_nrows(h);
    if (m->rule().act != PINFER_ACT_GRAPH && !is_models(e, m->rule(), ffn, h)) {
        return refuse_activation(m, ffn);
    }
    const pinfer_neurons * const cold = m->cold ? &m->cold->ffns[(size_t) ffn] : nullptr;
    if (cold && cold->n == h->ne[0] && m->ffns[(size_t) ffn].checked && n_tokens < m->settings.n_batch_dense && !m->observer.on &&
        ggml_is_contiguous(h)) {
        pinfer_sparse_down(&e->team, *cold, (const float *) h->data, h->ne[0], node->ne[0], n_tokens, (float *) node->data);
        return GGML_STATUS_SUCCESS;
    }
    return pinfer_team_nodes(&e->team, &node, 1);
}

// A node outside a whole FFN, computed from its direct sources: what lies before them may be overwritten by now. A down
// product whose input is not the model's activation is refused: it would be silently wrong.
static ggml_status compute_single(pinfer_engine * e, pinfer_model * m, ggml_tensor * node) {
    int ffn = -1;
    if (node->op == GGML_OP_MUL_MAT && pinfer_part_of(node->src[0]->name, false, &ffn) == PINFER_PART_DOWN && has_norm(*m, ffn)) {
        return compute_second_half(e, m, node, ffn);
    }
    m->stats.n_fallback++;
    if (m->announce_fallback) {
        m->announce_fallback = false;
        fprintf(stderr, "pinfer: %s (%s) is not part of an FFN that pinfer knows; such nodes run on the plain CPU backend\n",
                node->name, ggml_op_desc(node));
    }
    if (node->op == GGML_OP_ADD && node->src[1]->type != GGML_TYPE_F32 &&
        pinfer_part_of(node->src[1]->name, true, &ffn) != PINFER_PART_NONE && ggml_is_contiguous(node->src[0])) {
        return compute_bias(e, m, node);
    }
    if (m->rule().act == PINFER_ACT_GRAPH || m->rule().act == PINFER_ACT_OTHER) {
        return pinfer_team_nodes(&e->team, &node, 1);
    }
    ffn = replaced_activation(node, m->rule());
    if (ffn >= 0) {
        return compute_activation(e, m, node, ffn);
    }
    if ((node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) &&
        pinfer_part_of(node->src[0]->name, false, &ffn) == PINFER_PART_DOWN && !is_models(e, m->rule(), ffn, node->src[1])) {
        return refuse_activation(m, ffn);
    }
    return pinfer_team_nodes(&e->team, &node, 1);
}

static bool is_embedding_lookup(const ggml_tensor * op) {
    return op->op == GGML_OP_GET_ROWS && !strcmp(op->src[0]->name, "token_embd.weight");
}

// The model of such a node, and its FFN that lies elsewhere; null: none that must be refused.
static std::shared_ptr<pinfer_model> model_to_refuse(const ggml_tensor * op, int * ffn) {
    const ggml_tensor * const embedding = op->src[0];
    for (const auto & m : pinfer_models()) {
        if (embedding->data && m->replaces_activation() && m->header.token_embd.is(embedding) &&
            (*ffn = pinfer_model_missing_ffn(m.get())) >= 0) {
            // known by the mapping, or, where the file was read into memory, by the shape
            const auto mapped = pinfer_model_mapped_at(embedding->data);
            if (!mapped || mapped == m) {
                return m;
            }
        }
    }
    return nullptr;
}

bool pinfer_engine_must_refuse(const ggml_tensor * op) {
    int ffn = -1;
    if (!is_embedding_lookup(op)) {
        return false;
    }
    if (!op->src[0]->data) { // while a model loads: where it must not be, its embedding is claimed, and then gets no buffer
        const auto m = pinfer_model_of_weight(op->src[0]);
        return m && !m->refusal.empty();
    }
    return model_to_refuse(op, &ffn) != nullptr;
}

static ggml_status refuse(const ggml_tensor * op) {
    int        ffn = -1;
    const auto m   = model_to_refuse(op, &ffn);
    if (!m) {
        return GGML_STATUS_FAILED;
    }
    const std::string why = "the FFN (" + pinfer_ffn_title(ffn) + ") of " + m->settings.model +
                            " is outside the plugin's buffers, so llama.cpp would compute another activation than " +
                            pinfer_activation_name(m->rule().act) + "; with -ngl also pass: -ot '" PINFER_FFN_TENSORS "=PINFER'";
    fprintf(stderr, "pinfer: %s\n", why.c_str());
    std::lock_guard<std::mutex> lock(m->mutex);
    m->failure = why;
    return GGML_STATUS_FAILED;
}

namespace {

// How a node of the split is dealt with: `ends` is the index into the FFN list it completes, -1: none.
struct plan_entry {
    bool inside = false;
    int  ends   = -1;
};

} // namespace

static bool computes_whole(const pinfer_rule & rule, const pinfer_ffn & f) {
    if (rule.act == PINFER_ACT_OTHER) { // whole experts
        return f.is_stack() && f.gated() && f.h->op == GGML_OP_GLU;
    }
    if (f.is_stack() && (f.gate.add || f.up.add || f.down.add)) {
        return false;
    }
    // otherwise there are no exact zeros, and the CPU backend does it; or the rule is for other FFNs, which is refused there
    return rule.act == PINFER_ACT_GRAPH ? f.graph_act != PINFER_ACT_OTHER : pinfer_is_gated(rule.act) == f.gated();
}

static ggml_status compute_ffn(pinfer_engine * e, pinfer_model * m, const pinfer_ffn & f) {
    std::lock_guard<std::mutex> lock(m->mutex);
    const bool                  first = m->cold && (size_t) f.index < m->ffns.size() && !m->ffns[(size_t) f.index].checked;
    m->failure.clear();
    const ggml_status status = pinfer_ffn_compute(&e->team, m, f);
    if (first) { // the loader of libllama has read the whole file; behind shards nothing reads the model's own matrices
        for (const ggml_tensor * weight : {f.gate.weight, f.up.weight, f.down.weight}) {
            if (weight && (!f.is_stack() || weight == f.down.weight)) { // but the gate and up rows of experts
                pinfer_weight_release_pages(weight);
            }
        }
    }
    return status;
}

static ggml_status compute_node(pinfer_engine * e, ggml_tensor * node) {
    if (is_embedding_lookup(node)) {
        return refuse(node);
    }
    const pinfer_claim claim = pinfer_match_claim(node);
    const auto         m     = claim.weight ? pinfer_model_of_weight(claim.weight) : nullptr;
    if (!m) {
        return pinfer_team_nodes(&e->team, &node, 1);
    }
    std::lock_guard<std::mutex> lock(m->mutex);
    m->failure.clear();
    return compute_single(e, m.get(), node);
}

void pinfer_engine_finish(pinfer_engine * e) {
    if (const auto m = e->used.lock()) {
        std::lock_guard<std::mutex> lock(m->mutex);
        pinfer_model_finish_check(m.get());
    }
}

static ggml_status compute_split(pinfer_engine * e, ggml_cgraph * graph) {
    ggml_tensor ** nodes = graph->nodes;
    const int      n     = graph->n_nodes;

    std::vector<plan_entry>                    plan((size_t) n);
    std::vector<pinfer_ffn>                    ffns;
    std::vector<std::shared_ptr<pinfer_model>> models; // of the FFNs
    for (int i = 0; i < n; i++) {
        pinfer_ffn f;
        const bool whole = pinfer_match_ffn(graph, i, &f);
        if (!whole && !pinfer_match_half(graph, i, &f)) {
            continue;
        }
        const auto m = pinfer_model_of_weight(f.up.weight);
        if (!m || (whole ? pinfer_model_of_weight(f.down.weight) != m : !has_norm(*m, f.index)) || (f.gated() && pinfer_model_of_weight(f.gate.weight) != m) ||
            !computes_whole(m->rule(), f)) {
            continue;
        }
        std::vector<const ggml_tensor *> members = {f.gate.mul_mat, f.gate.add,     f.up.mul_mat, f.up.add, f.inner,
                                                    f.h,            f.down.mul_mat, f.down.add,   f.weighted};
        members.insert(members.end(), f.sums.begin(), f.sums.end());
        for (int k = 0; k < n; k++) {
            if (std::find(members.begin(), members.end(), nodes[k]) != members.end()) {
                plan[(size_t) k].inside = true;
            }
            if (nodes[k] == f.out()) {
                plan[(size_t) k].ends = (int) ffns.size();
            }
        }
        ffns.push_back(f);
        models.push_back(m);
    }

    for (int i = 0; i < n; i++) {
        const plan_entry & p      = plan[(size_t) i];
        ggml_status        status = GGML_STATUS_SUCCESS;
        if (p.ends >= 0) {
            const auto & m = models[(size_t) p.ends];
            e->used        = m;
            status         = compute_ffn(e, m.get(), ffns[(size_t) p.ends]);
            if (ffns[(size_t) p.ends].is_half()) {
                mark_done(e, ffns[(size_t) p.ends].index, ffns[(size_t) p.ends].h);
            }
        } else if (!p.inside && !is_view(nodes[i])) {
            status = compute_node(e, nodes[i]);
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

ggml_status pinfer_engine_compute(pinfer_engine * e, ggml_cgraph * graph) {
    e->team.watch.start();
    const ggml_status status = compute_split(e, graph);
    e->team.watch.lap(PINFER_STEP_OTHER);
    e->team.watch.stop();
    return status;
}
