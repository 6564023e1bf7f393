// match.cpp: recognition of FFN graphs. Patterns are those libllama builds: down(f(up)), down(sqr(relu(up))),
// down(glu(gate, up)) and down(unary(gate) * up), each product with or without a bias.
#include "match.h"

#include <cstdio>
#include <cstring>
#include <initializer_list>

pinfer_part pinfer_tensor_part(const ggml_tensor * t, bool bias, int * layer) {
    int  il = -1, end = -1;
    char part[8], kind[8];
    if (sscanf(t->name, "blk.%d.ffn_%4[a-z].%6[a-z]%n", &il, part, kind, &end) != 3 || t->name[end] != '\0' || il < 0 ||
        strcmp(kind, bias ? "bias" : "weight") != 0) {
        return PINFER_PART_NONE;
    }
    *layer = il;
    if (!strcmp(part, "up")) {
        return PINFER_PART_UP;
    }
    if (!strcmp(part, "gate")) {
        return PINFER_PART_GATE;
    }
    return !strcmp(part, "down") ? PINFER_PART_DOWN : PINFER_PART_NONE;
}

// A product with the given part's weight; *layer is set from it.
static bool match_product(ggml_tensor * t, pinfer_part part, pinfer_product * out, int * layer) {
    pinfer_product p;
    int            il = -1;
    if (t->op == GGML_OP_ADD) {
        if (pinfer_tensor_part(t->src[1], true, &il) != part) {
            return false;
        }
        p.add  = t;
        p.bias = t->src[1];
        t      = t->src[0];
    }
    if (t->op != GGML_OP_MUL_MAT || pinfer_tensor_part(t->src[0], false, layer) != part || (il >= 0 && il != *layer)) {
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
        case GGML_OP_GLU: // src[1] null: gate and up are one matrix, which is no model of ours
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

static bool among(ggml_tensor ** nodes, int n, const ggml_tensor * t) {
    for (int i = 0; i < n && t; i++) {
        if (nodes[i] == t) {
            return true;
        }
    }
    return t == nullptr;
}

static bool is_token_matrix(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && t->ne[2] == 1 && t->ne[3] == 1;
}

bool pinfer_match_ffn(ggml_tensor ** nodes, int n, int i_down, pinfer_ffn * out) {
    ggml_tensor *  down = nodes[i_down];
    pinfer_ffn     f;
    pinfer_product d;
    int            il = -1;
    if (!match_product(down, PINFER_PART_DOWN, &d, &il) || d.add || !pinfer_match_activation(down->src[1], &f) ||
        f.layer != il) {
        return false;
    }
    int il_bias = -1;
    for (int i = i_down + 1; i < n; i++) {
        if (nodes[i]->op == GGML_OP_ADD && nodes[i]->src[0] == down &&
            pinfer_tensor_part(nodes[i]->src[1], true, &il_bias) == PINFER_PART_DOWN && il_bias == il) {
            d.add  = nodes[i];
            d.bias = nodes[i]->src[1];
            break;
        }
    }
    f.down = d;
    for (const ggml_tensor * t : {f.gate.mul_mat, f.gate.add, f.up.mul_mat, f.up.add, f.inner, f.h}) {
        if (!among(nodes, i_down, t)) {
            return false;
        }
    }
    if (!is_token_matrix(f.x) || !is_token_matrix(f.h) || !is_token_matrix(f.up.out()) || !is_token_matrix(d.out()) ||
        (f.gated() && !is_token_matrix(f.gate.out()))) {
        return false;
    }
    *out = f;
    return true;
}

// libllama names the activation node of layer 7 "ffn_swiglu-7", "ffn_gelu-7", ...
static bool is_named_activation(const ggml_tensor * t) {
    char what[16];
    int  layer = -1;
    return sscanf(t->name, "ffn_%15[a-z]-%d", what, &layer) == 2 && layer >= 0;
}

bool pinfer_match_claims(const ggml_tensor * op, bool own_activation, bool (*is_ours)(const ggml_tensor * weight)) {
    int layer = -1;
    // Behind a LoRA adapter the products are not recognised, but the activation must still be the model's.
    if (own_activation && (op->op == GGML_OP_GLU || op->op == GGML_OP_UNARY) && is_named_activation(op)) {
        return true;
    }
    switch (op->op) {
        case GGML_OP_NONE:
            return (pinfer_tensor_part(op, false, &layer) != PINFER_PART_NONE ||
                    pinfer_tensor_part(op, true, &layer) != PINFER_PART_NONE) && is_ours(op);
        case GGML_OP_MUL_MAT:
            return pinfer_tensor_part(op->src[0], false, &layer) != PINFER_PART_NONE && is_ours(op->src[0]) &&
                   op->src[1]->type == GGML_TYPE_F32 && op->src[0]->ne[2] == 1 && op->src[0]->ne[3] == 1;
        case GGML_OP_ADD:
            // while a model loads, src[0] is a stand-in without an op
            return pinfer_tensor_part(op->src[1], true, &layer) != PINFER_PART_NONE && is_ours(op->src[1]) &&
                   (op->src[0]->op == GGML_OP_NONE || pinfer_match_claims(op->src[0], own_activation, is_ours));
        case GGML_OP_UNARY: {
            pinfer_product p;
            return (match_product(op->src[0], PINFER_PART_UP, &p, &layer) ||
                    match_product(op->src[0], PINFER_PART_GATE, &p, &layer)) && is_ours(p.weight);
        }
        case GGML_OP_GLU:
        case GGML_OP_MUL:
        case GGML_OP_SQR: {
            pinfer_ffn f;
            return pinfer_match_activation(const_cast<ggml_tensor *>(op), &f) && is_ours(f.up.weight);
        }
        default:
            return false;
    }
}
