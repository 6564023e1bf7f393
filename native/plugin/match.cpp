// match.cpp: recognition of FFN graphs. Patterns are those libllama builds: down(f(up)), down(sqr(relu(up))),
// down(glu(gate, up)) and down(unary(gate) * up), each product with or without a bias.
#include "match.h"

#include "ggml-impl.h"

#include <climits>
#include <cstdio>
#include <initializer_list>

// A product with the given part's weight; *layer is set from it.
static bool match_product(ggml_tensor * t, pinfer_part part, pinfer_product * out, int * layer) {
    pinfer_product p;
    int            il = -1;
    if (t->op == GGML_OP_ADD) {
        if (pinfer_part_of(t->src[1]->name, true, &il) != part) {
            return false;
        }
        p.add  = t;
        p.bias = t->src[1];
        t      = t->src[0];
    }
    if (t->op != GGML_OP_MUL_MAT || pinfer_part_of(t->src[0]->name, false, layer) != part || (il >= 0 && il != *layer)) {
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
    int il_up = -1;
    return match_product(gate, PINFER_PART_GATE, &f->gate, &f->layer) &&
           match_product(up, PINFER_PART_UP, &f->up, &il_up) && il_up == f->layer &&
           f->gate.mul_mat->src[1] == f->up.mul_mat->src[1];
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
            ok          = f.inner->op == GGML_OP_UNARY && match_product(f.inner->src[0], PINFER_PART_UP, &f.up, &f.layer);
            f.graph_act = ok && unary_activation(f.inner, false) == PINFER_ACT_RELU ? PINFER_ACT_RELU2 : PINFER_ACT_OTHER;
            break;
        case GGML_OP_UNARY:
            ok          = match_product(h->src[0], PINFER_PART_UP, &f.up, &f.layer);
            f.graph_act = unary_activation(h, false);
            break;
        default:
            break;
    }
    if (ok) {
        f.x  = f.up.mul_mat->src[1];
        *out = f;
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
static void match_down_bias(const ggml_cgraph * graph, int i_down, int layer, pinfer_product * down) {
    int il = -1;
    for (int i = i_down + 1; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (node->op == GGML_OP_ADD && node->src[0] == down->mul_mat &&
            pinfer_part_of(node->src[1]->name, true, &il) == PINFER_PART_DOWN && il == layer) {
            down->add  = node;
            down->bias = node->src[1];
            return;
        }
    }
}

bool pinfer_match_ffn(const ggml_cgraph * graph, int i_down, pinfer_ffn * out) {
    ggml_tensor * down = graph->nodes[i_down];
    pinfer_ffn    f;
    int           il = -1;
    if (down->op != GGML_OP_MUL_MAT || !match_product(down, PINFER_PART_DOWN, &f.down, &il)) {
        return false;
    }
    const pinfer_product d = f.down;
    if (!pinfer_match_activation(down->src[1], &f) || f.layer != il) {
        return false;
    }
    f.down = d;
    match_down_bias(graph, i_down, il, &f.down);
    for (const ggml_tensor * t : {f.gate.mul_mat, f.gate.add, f.up.mul_mat, f.up.add, f.inner}) {
        if (t && (!is_among(graph, i_down, t) || readers(graph, t) != 1)) {
            return false;
        }
    }
    if (!is_among(graph, i_down, f.h) || (f.down.add && readers(graph, down) != 1)) {
        return false;
    }
    f.h_is_read = readers(graph, f.h) != 1;
    if (!is_token_matrix(f.x) || !is_token_matrix(f.h) || !is_token_matrix(f.up.out()) || !is_token_matrix(f.down.out()) ||
        (f.gated() && !is_token_matrix(f.gate.out()))) {
        return false;
    }
    *out = f;
    return true;
}

int pinfer_named_layer(const ggml_tensor * t) {
    char what[16];
    int  layer = -1;
    return sscanf(t->name, "ffn_%15[a-z]-%9d", what, &layer) == 2 ? layer : -1;
}

// The gate or up weight whose product, through an adapter's additions, t is.
static const ggml_tensor * weight_behind(const ggml_tensor * t, int depth) {
    int layer = -1;
    switch (depth > 0 && t ? t->op : GGML_OP_NONE) {
        case GGML_OP_MUL_MAT: {
            const pinfer_part part = pinfer_part_of(t->src[0]->name, false, &layer);
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

static const ggml_tensor * claimed_weight(const ggml_tensor * op) {
    int layer = -1;
    switch (op->op) {
        case GGML_OP_NONE:
            return pinfer_part_of(op->name, false, &layer) != PINFER_PART_NONE ||
                   pinfer_part_of(op->name, true, &layer) != PINFER_PART_NONE ? op : nullptr;
        case GGML_OP_MUL_MAT:
            return pinfer_part_of(op->src[0]->name, false, &layer) != PINFER_PART_NONE && op->src[1]->type == GGML_TYPE_F32 &&
                   op->src[0]->ne[2] == 1 && op->src[0]->ne[3] == 1 ? op->src[0] : nullptr;
        case GGML_OP_ADD:
            // while a model loads, src[0] is a stand-in without an op
            return pinfer_part_of(op->src[1]->name, true, &layer) != PINFER_PART_NONE &&
                   (op->src[0]->op == GGML_OP_NONE || pinfer_match_claim(op->src[0]).weight) ? op->src[1] : nullptr;
        case GGML_OP_UNARY: {
            pinfer_product p;
            return match_product(op->src[0], PINFER_PART_UP, &p, &layer) ||
                   match_product(op->src[0], PINFER_PART_GATE, &p, &layer) ? p.weight : nullptr;
        }
        case GGML_OP_GLU:
        case GGML_OP_MUL:
        case GGML_OP_SQR: {
            pinfer_ffn f;
            return pinfer_match_activation(const_cast<ggml_tensor *>(op), &f) ? f.up.weight : nullptr;
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
    if ((op->op == GGML_OP_GLU || op->op == GGML_OP_UNARY) && pinfer_named_layer(op) >= 0) {
        return {weight_behind(op, 8), true};
    }
    return {};
}
