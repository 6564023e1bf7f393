// match.cpp: recognition of FFN graphs. Patterns are those libllama builds: down(f(up)), down(sqr(relu(up))),
// down(glu(gate, up)) and down(unary(gate) * up), each product with or without a bias.
#include "match.h"

#include "ggml-impl.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <initializer_list>

static bool is_product(const ggml_tensor * t) {
    return t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL_MAT_ID;
}

// Part and FFN of the weight of a product: a stack of experts is multiplied by their ids, any other matrix is not.
static pinfer_part product_part(const ggml_tensor * t, int * ffn) {
    const pinfer_part part = is_product(t) ? pinfer_part_of(t->src[0]->name, false, ffn) : PINFER_PART_NONE;
    const bool        fits = part != PINFER_PART_NONE &&
                      (pinfer_ffn_kind_of(*ffn) == PINFER_FFN_EXPERTS) == (t->op == GGML_OP_MUL_MAT_ID);
    return fits ? part : PINFER_PART_NONE;
}

// A product with the given part's weight; *ffn is set from it.
static bool match_product(ggml_tensor * t, pinfer_part part, pinfer_product * out, int * ffn) {
    pinfer_product p;
    int            of_bias = -1;
    if (t->op == GGML_OP_ADD || t->op == GGML_OP_ADD_ID) {
        if (pinfer_part_of(t->src[1]->name, true, &of_bias) != part) {
            return false;
        }
        p.add  = t;
        p.bias = t->src[1];
        t      = t->src[0];
    }
    if (product_part(t, ffn) != part || (of_bias >= 0 && of_bias != *ffn) ||
        (p.add && (p.add->op == GGML_OP_ADD_ID ? p.add->src[2] != t->src[2] : t->op == GGML_OP_MUL_MAT_ID))) {
        return false;
    }
    p.mul_mat = t;
    p.weight  = t->src[0];
    *out      = p;
    return true;
}

// Activation that a unary (ungated or as the gate's function) stands for.
static pinfer_activation unary_activation(const ggml_tensor * t, bool gated) {
    if (ggml_get_unary_op(t) != GGML_UNARY_OP_RELU) {
        return PINFER_ACT_OTHER;
    }
    return gated ? PINFER_ACT_REGLU : PINFER_ACT_RELU;
}

static bool match_gated(ggml_tensor * gate, ggml_tensor * up, pinfer_ffn * f) {
    int of_up = -1;
    return match_product(gate, PINFER_PART_GATE, &f->gate, &f->index) &&
           match_product(up, PINFER_PART_UP, &f->up, &of_up) && of_up == f->index &&
           f->gate.mul_mat->src[1] == f->up.mul_mat->src[1] && f->gate.mul_mat->src[2] == f->up.mul_mat->src[2];
}

bool pinfer_match_activation(ggml_tensor * h, pinfer_ffn * out) {
    pinfer_ffn f;
    f.h     = h;
    bool ok = false;
    switch (h->op) {
        case GGML_OP_GLU: // src[1] null: gate and up are one matrix, which no supported model has
            ok          = h->src[1] && match_gated(h->src[0], h->src[1], &f);
            f.graph_act = ggml_get_glu_op(h) == GGML_GLU_OP_REGLU ? PINFER_ACT_REGLU : PINFER_ACT_OTHER;
            break;
        case GGML_OP_MUL:
            for (int i = 0; i < 2 && !ok; i++) {
                f.inner = h->src[i];
                ok      = f.inner->op == GGML_OP_UNARY && match_gated(f.inner->src[0], h->src[1 - i], &f);
            }
            f.graph_act = ok ? unary_activation(f.inner, true) : PINFER_ACT_OTHER;
            break;
        case GGML_OP_SQR:
            f.inner     = h->src[0];
            ok          = f.inner->op == GGML_OP_UNARY && match_product(f.inner->src[0], PINFER_PART_UP, &f.up, &f.index);
            f.graph_act = ok && unary_activation(f.inner, false) == PINFER_ACT_RELU ? PINFER_ACT_RELU2 : PINFER_ACT_OTHER;
            break;
        case GGML_OP_UNARY:
            ok          = match_product(h->src[0], PINFER_PART_UP, &f.up, &f.index);
            f.graph_act = unary_activation(h, false);
            break;
        default:
            break;
    }
    if (ok) {
        f.x       = f.up.mul_mat->src[1];
        f.experts = f.up.mul_mat->src[2];
        *out      = f;
    }
    return ok;
}

static bool is_token_matrix(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && t->ne[2] == 1 && t->ne[3] == 1;
}

// Nodes of the whole graph that read t. A scheduler hands over one split, but its counts are of all: INT_MAX where there are none.
static int readers(const ggml_cgraph * graph, const ggml_tensor * t) {
    const ggml_hash_set & set = graph->visited_hash_set;
    const size_t          at  = set.size ? ggml_hash_find(&set, t) : GGML_HASHSET_FULL;
    const bool            counted = graph->use_counts && at != GGML_HASHSET_FULL && ggml_bitset_get(set.used, at);
    return counted && !(t->flags & GGML_TENSOR_FLAG_OUTPUT) ? graph->use_counts[at] : INT_MAX;
}

static bool is_among(const ggml_cgraph * graph, int n, const ggml_tensor * t) {
    for (int i = n - 1; i >= 0; i--) {
        if (graph->nodes[i] == t) {
            return true;
        }
    }
    return false;
}

// The bias of the down product where it follows in the graph.
static void match_down_bias(const ggml_cgraph * graph, int i_down, int ffn, pinfer_product * down) {
    int of = -1;
    for (int i = i_down + 1; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (node->op == GGML_OP_ADD && node->src[0] == down->mul_mat &&
            pinfer_part_of(node->src[1]->name, true, &of) == PINFER_PART_DOWN && of == ffn) {
            down->add  = node;
            down->bias = node->src[1];
            return;
        }
    }
}

// The place of t among the experts of `weighted`, whose outputs lie behind each other; -1: it is no view of one.
static int64_t expert_of_view(const ggml_tensor * t, const ggml_tensor * weighted) {
    const bool whole = t->op == GGML_OP_VIEW && t->src[0] == weighted && t->ne[0] == weighted->ne[0] && t->ne[1] == weighted->ne[2] &&
                       t->ne[2] == 1 && t->nb[1] == weighted->nb[2] && t->view_offs % weighted->nb[1] == 0;
    return whole ? (int64_t) (t->view_offs / weighted->nb[1]) : -1;
}

// What follows the down product of a stack: times the weights, then the sum of the first experts, each by a view.
static bool match_sum(const ggml_cgraph * graph, int i_down, pinfer_ffn * f) {
    for (int i = i_down + 1; i < graph->n_nodes; i++) {
        ggml_tensor * const       node = graph->nodes[i];
        const ggml_tensor * const last = f->sums.empty() ? (f->views.empty() ? nullptr : f->views[0]) : f->sums.back();
        if (!f->weighted) {
            pinfer_product biased;
            int            ffn = -1;
            if (node->op == GGML_OP_ADD_ID && node->src[0] == f->down.mul_mat &&
                match_product(node, PINFER_PART_DOWN, &biased, &ffn) && ffn == f->index) {
                f->down = biased;
            } else if (node->op == GGML_OP_MUL && node->src[0] == f->down.out()) {
                f->weighted = node;
                f->weights  = node->src[1];
            }
        } else if (expert_of_view(node, f->weighted) == (int64_t) f->views.size()) {
            f->views.push_back(node);
        } else if (node->op == GGML_OP_ADD && node->src[0] == last && f->sums.size() + 1 < f->views.size() &&
                   node->src[1] == f->views[f->sums.size() + 1]) {
            f->sums.push_back(node);
        } else if (node->op == GGML_OP_CONT && node->src[0] == last && f->views.size() == 1) {
            f->sums.push_back(node);
        }
    }
    return !f->sums.empty() && f->sums.size() == std::max<size_t>(f->views.size() - 1, 1);
}

// Whether nothing but the stack itself reads what lies between its input and its output.
static bool is_closed(const ggml_cgraph * graph, const pinfer_ffn & f) {
    bool closed = readers(graph, f.down.mul_mat) == 1 && readers(graph, f.down.out()) == 1 && readers(graph, f.h) == 1 &&
                  readers(graph, f.weighted) == (int) f.views.size();
    for (const ggml_tensor * view : f.views) {
        closed = closed && readers(graph, view) == 1;
    }
    for (size_t i = 0; i + 1 < f.sums.size(); i++) {
        closed = closed && readers(graph, f.sums[i]) == 1;
    }
    return closed;
}

static bool is_plain(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
}

static bool match_stack(const ggml_cgraph * graph, int i_down, pinfer_ffn * f) {
    const ggml_tensor * const ids = f->experts;
    if (f->down.mul_mat->src[2] != ids || !match_sum(graph, i_down, f) || !is_closed(graph, *f)) {
        return false;
    }
    const int64_t k = ids->ne[0], n_tokens = f->x->ne[2];
    const auto    is = [&](const ggml_tensor * t) { return is_plain(t) && t->ne[1] == k && t->ne[2] == n_tokens && t->ne[3] == 1; };
    return ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t) && ids->ne[1] == n_tokens && is_plain(f->x) &&
           f->x->ne[1] == 1 && f->x->ne[3] == 1 && is(f->h) && is(f->up.mul_mat) && (!f->gated() || is(f->gate.mul_mat)) &&
           is(f->weighted) && f->weights->type == GGML_TYPE_F32 && f->weights->ne[0] == 1 && f->weights->ne[1] == k &&
           f->weights->ne[2] == n_tokens && (int64_t) f->views.size() <= k && is_token_matrix(f->out());
}

// Whether the products that lead to h come before node i, and nothing else reads them.
static bool has_products(const ggml_cgraph * graph, int i, const pinfer_ffn & f) {
    for (const ggml_tensor * t : {f.gate.mul_mat, f.gate.add, f.up.mul_mat, f.up.add, f.inner}) {
        if (t && (!is_among(graph, i, t) || readers(graph, t) != 1)) {
            return false;
        }
    }
    return true;
}

static bool are_token_matrices(const pinfer_ffn & f) {
    return is_token_matrix(f.x) && is_token_matrix(f.h) && is_token_matrix(f.up.out()) &&
           (!f.gated() || is_token_matrix(f.gate.out()));
}

bool pinfer_match_ffn(const ggml_cgraph * graph, int i_down, pinfer_ffn * out) {
    ggml_tensor * down = graph->nodes[i_down];
    pinfer_ffn    f;
    int           ffn = -1;
    if (!is_product(down) || !match_product(down, PINFER_PART_DOWN, &f.down, &ffn)) {
        return false;
    }
    const pinfer_product d = f.down;
    if (!pinfer_match_activation(down->src[1], &f) || f.index != ffn) {
        return false;
    }
    f.down = d;
    if (!has_products(graph, i_down, f) || !is_among(graph, i_down, f.h)) {
        return false;
    }
    if (f.is_stack()) {
        if (!match_stack(graph, i_down, &f)) {
            return false;
        }
        *out = f;
        return true;
    }
    match_down_bias(graph, i_down, ffn, &f.down);
    if (f.down.add && readers(graph, down) != 1) {
        return false;
    }
    f.h_is_read = readers(graph, f.h) != 1;
    if (!are_token_matrices(f) || !is_token_matrix(f.down.out())) {
        return false;
    }
    *out = f;
    return true;
}

bool pinfer_match_half(const ggml_cgraph * graph, int i_h, pinfer_ffn * out) {
    pinfer_ffn f;
    if (!pinfer_match_activation(graph->nodes[i_h], &f) || f.is_stack() || !has_products(graph, i_h, f) || !are_token_matrices(f)) {
        return false;
    }
    *out = f;
    return true;
}

bool pinfer_is_named_activation(const ggml_tensor * t) {
    char what[32];
    int  layer = -1;
    return sscanf(t->name, "ffn_%31[a-z_]-%9d", what, &layer) == 2 && layer >= 0;
}

// The gate or up weight whose product, through an adapter's additions, t is.
static const ggml_tensor * weight_behind(const ggml_tensor * t, int depth) {
    int ffn = -1;
    switch (depth > 0 && t ? t->op : GGML_OP_NONE) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID: {
            const pinfer_part part = product_part(t, &ffn);
            return part == PINFER_PART_GATE || part == PINFER_PART_UP ? t->src[0] : nullptr;
        }
        case GGML_OP_ADD:
        case GGML_OP_MUL:
        case GGML_OP_SCALE:
        case GGML_OP_UNARY:
        case GGML_OP_GLU: {
            const ggml_tensor * const found = weight_behind(t->src[0], depth - 1);
            return found ? found : weight_behind(t->src[1], depth - 1);
        }
        default:
            return nullptr;
    }
}

// The down weight of a stack whose sum over the experts, or a step to it, t is.
static const ggml_tensor * summed_weight(const ggml_tensor * t) {
    int ffn = -1;
    if (t && (t->op == GGML_OP_ADD || t->op == GGML_OP_CONT)) {
        t = t->op == GGML_OP_ADD ? t->src[1] : t->src[0];
        t = t->op == GGML_OP_VIEW ? t->src[0] : nullptr;
    }
    const ggml_tensor * down = t && t->op == GGML_OP_MUL ? t->src[0] : nullptr;
    down = down && down->op == GGML_OP_ADD_ID ? down->src[0] : down;
    const bool is_down = down && down->op == GGML_OP_MUL_MAT_ID && product_part(down, &ffn) == PINFER_PART_DOWN;
    return is_down ? down->src[0] : nullptr;
}

static const ggml_tensor * claimed_weight(const ggml_tensor * op) {
    int ffn = -1;
    switch (op->op) {
        case GGML_OP_NONE:
            return pinfer_part_of(op->name, false, &ffn) != PINFER_PART_NONE ||
                   pinfer_part_of(op->name, true, &ffn) != PINFER_PART_NONE ? op : nullptr;
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return product_part(op, &ffn) != PINFER_PART_NONE && op->src[1]->type == GGML_TYPE_F32 &&
                   (op->op == GGML_OP_MUL_MAT_ID || op->src[0]->ne[2] == 1) && op->src[0]->ne[3] == 1 ? op->src[0] : nullptr;
        case GGML_OP_ADD:
            // while a model loads, src[0] is a stand-in without an op
            return pinfer_part_of(op->src[1]->name, true, &ffn) != PINFER_PART_NONE &&
                   (op->src[0]->op == GGML_OP_NONE || pinfer_match_claim(op->src[0]).weight) ? op->src[1] : summed_weight(op);
        case GGML_OP_ADD_ID: {
            pinfer_product p;
            ggml_tensor *  t = const_cast<ggml_tensor *>(op);
            return match_product(t, PINFER_PART_GATE, &p, &ffn) || match_product(t, PINFER_PART_UP, &p, &ffn) ||
                   match_product(t, PINFER_PART_DOWN, &p, &ffn) ? p.weight : nullptr;
        }
        case GGML_OP_CONT:
            return summed_weight(op);
        case GGML_OP_UNARY: {
            pinfer_product p;
            return match_product(op->src[0], PINFER_PART_UP, &p, &ffn) ||
                   match_product(op->src[0], PINFER_PART_GATE, &p, &ffn) ? p.weight : nullptr;
        }
        case GGML_OP_GLU:
        case GGML_OP_MUL:
        case GGML_OP_SQR: {
            pinfer_ffn f;
            return pinfer_match_activation(const_cast<ggml_tensor *>(op), &f) ? f.up.weight : summed_weight(op);
        }
        default:
            return nullptr;
    }
}

pinfer_claim pinfer_match_claim(const ggml_tensor * op) {
    const ggml_tensor * const weight = claimed_weight(op);
    if (weight) {
        return {weight, false};
    }
    if ((op->op == GGML_OP_GLU || op->op == GGML_OP_UNARY) && pinfer_is_named_activation(op)) {
        return {weight_behind(op, 8), true};
    }
    return {};
}
