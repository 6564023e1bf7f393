// fuzz_graphs.cpp: graphs made from any bytes, with the names that llama.cpp gives, for the matcher. What it takes for an FFN is one:
// its nodes are in the graph, feed each other as they should, and are read by nobody else.
#include "ggml-impl.h"
#include "ggml.h"
#include "match.h"

#include <cstdlib>
#include <vector>

static void require(bool ok) {
    if (!ok) {
        abort();
    }
}

static const char * const NAMES[] = {
    "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_down.weight", "blk.0.ffn_up.bias", "blk.0.ffn_gate.bias",
    "blk.0.ffn_down.bias", "blk.1.ffn_up.weight",   "blk.1.ffn_down.weight", "ffn_swiglu-0",      "ffn_norm-0",
    "ffn_relu-1",          "token_embd.weight",     "blk.9999999999.ffn_up.weight", "blk.0.ffn_up.weight.lora_a", "",
};

static int reads(const ggml_cgraph * graph, const ggml_tensor * t) {
    int n = 0;
    for (int i = 0; i < graph->n_nodes; i++) {
        for (const ggml_tensor * src : graph->nodes[i]->src) {
            n += src == t;
        }
    }
    return n;
}

static bool is_read_by(const ggml_cgraph * graph, const ggml_tensor * t, int n) {
    return reads(graph, t) == n && !(t->flags & GGML_TENSOR_FLAG_OUTPUT);
}

// The sum of the first experts of each token, times their weights, and nothing else reads what lies before it.
static void check_sum(const ggml_cgraph * graph, const pinfer_ffn & f) {
    require(f.weighted->src[0] == f.down.mul_mat && f.weighted->src[1] == f.weights && is_read_by(graph, f.down.mul_mat, 1));
    require(is_read_by(graph, f.h, 1) && is_read_by(graph, f.weighted, (int) f.views.size()));
    require(!f.sums.empty() && f.sums.size() == (f.views.size() == 1 ? 1 : f.views.size() - 1));
    for (size_t i = 0; i < f.views.size(); i++) {
        require(f.views[i]->src[0] == f.weighted && f.views[i]->view_offs == i * f.weighted->nb[1] && is_read_by(graph, f.views[i], 1));
    }
    for (size_t i = 0; i < f.sums.size(); i++) {
        require(f.sums[i]->src[0] == (i ? f.sums[i - 1] : f.views[0]) && (i + 1 == f.sums.size() || is_read_by(graph, f.sums[i], 1)));
    }
}

static void check_ffn(const ggml_cgraph * graph, const pinfer_ffn & f) {
    int ffn = -1;
    require(f.index >= 0 && f.down.mul_mat->src[1] == f.h && f.up.mul_mat->src[1] == f.x);
    require(pinfer_part_of(f.up.weight->name, false, &ffn) == PINFER_PART_UP && ffn == f.index);
    require(pinfer_part_of(f.down.weight->name, false, &ffn) == PINFER_PART_DOWN && ffn == f.index);
    require(!f.gated() || (f.gate.mul_mat->src[1] == f.x && pinfer_part_of(f.gate.weight->name, false, &ffn) == PINFER_PART_GATE));
    require(f.is_stack() == (pinfer_ffn_kind_of(f.index) == PINFER_FFN_EXPERTS));
    for (const ggml_tensor * t : {f.gate.mul_mat, f.up.mul_mat, f.down.mul_mat}) {
        require(!t || t->src[2] == f.experts); // null where it is no stack
    }
    for (const ggml_tensor * t : {f.gate.mul_mat, f.gate.add, f.up.mul_mat, f.up.add, f.inner}) {
        require(!t || is_read_by(graph, t, 1));
    }
    if (f.is_stack()) {
        check_sum(graph, f);
    } else {
        require(f.h_is_read == !is_read_by(graph, f.h, 1));
    }
}

// Leafs of a graph with experts: their matrices, x, where the tokens go, the weights; and matrices of a shared expert.
static const int N_LEAFS = 8, IDS = 4;

static void add_stack_leafs(ggml_context * ctx, std::vector<ggml_tensor *> * all) {
    for (const char * name : {"blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"}) {
        all->push_back(ggml_set_name(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 8, 8, 4), name));
    }
    all->push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 8, 1, 8));
    all->push_back(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 8));
    all->push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, 2, 8));
    for (const char * name : {"blk.0.ffn_up_shexp.weight", "blk.0.ffn_down_shexp.weight"}) {
        all->push_back(ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 8, 8), name));
    }
}

// An operation of two tensors, by a number; null where their shapes do not allow it.
static ggml_tensor * operation(ggml_context * ctx, const std::vector<ggml_tensor *> & all, int which, ggml_tensor * a, ggml_tensor * b,
                               int place) {
    const bool same = ggml_are_same_shape(a, b) && ggml_is_contiguous(a) && ggml_is_contiguous(b);
    const bool flat = a->ne[2] == 1 && b->ne[2] == 1;
    if (a->type != GGML_TYPE_F32 || b->type != GGML_TYPE_F32) {
        return nullptr;
    }
    switch (which) {
        case 0: case 1:
            if (a->ne[0] == b->ne[0] && flat && a->nb[0] == sizeof(float)) {
                return ggml_mul_mat(ctx, a, b);
            }
            return a->ne[2] == 4 && a->ne[0] == b->ne[0] && b->ne[2] == 8 && b->ne[1] <= 2 ? ggml_mul_mat_id(ctx, a, b, all[IDS]) : nullptr;
        case 2: return ggml_are_same_shape(a, b) ? ggml_add(ctx, a, b) : nullptr;
        case 3: return ggml_is_contiguous(a) ? ggml_relu(ctx, a) : nullptr;
        case 4: return ggml_sqr(ctx, a);
        case 5: return same ? ggml_swiglu_split(ctx, a, b) : nullptr;
        case 6: return same ? ggml_reglu_split(ctx, a, b) : nullptr;
        case 7: return same || (a->ne[0] == 8 && b == all[IDS + 1] && a->ne[1] == 2 && a->ne[2] == 8) ? ggml_mul(ctx, a, b) : nullptr;
        case 8: return place & 1 ? ggml_cont(ctx, a) : ggml_scale(ctx, a, 2.0f);
        default: break;
    }
    return a->ne[2] == 8 && a->ne[0] == 8 ? ggml_view_2d(ctx, a, 8, 8, a->nb[2], (size_t) (place % a->ne[1]) * a->nb[1])
         : a->ne[0] == 8 && a->ne[1] == 8 ? ggml_view_2d(ctx, a, 8, 8, a->nb[1], 0) : nullptr;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static std::vector<uint8_t> memory(1 << 20);
    ggml_context * const        ctx = ggml_init({.mem_size = memory.size(), .mem_buffer = memory.data(), .no_alloc = true});
    std::vector<ggml_tensor *>  all;
    if (size % 4 == 1) {
        add_stack_leafs(ctx, &all);
    } else {
        for (int i = 0; i < N_LEAFS; i++) {
            all.push_back(ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 8, 8), NAMES[i < 6 ? i : 14]));
        }
    }
    for (size_t i = 0; i + 3 < size && all.size() < 64; i += 4) {
        ggml_tensor * const a = all[data[i + 1] % all.size()], * const b = all[data[i + 2] % all.size()];
        ggml_tensor * const t = operation(ctx, all, data[i] % 10, a, b, data[i + 2]);
        if (!t) {
            continue;
        }
        if (data[i + 3] & 0x80) {
            ggml_set_output(t);
        }
        ggml_set_name(t, NAMES[data[i + 3] % (sizeof(NAMES) / sizeof(NAMES[0]))]);
        all.push_back(t);
    }
    ggml_cgraph * const graph = ggml_new_graph_custom(ctx, 256, false);
    for (ggml_tensor * t : all) {
        pinfer_match_claim(t);
        ggml_build_forward_expand(graph, t);
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        pinfer_ffn f;
        if (pinfer_match_ffn(graph, i, &f)) {
            check_ffn(graph, f);
        }
        for (int j = i + 1; j <= graph->n_nodes; j += 3) { // as a scheduler hands them over: a part
            ggml_cgraph part = *graph;
            part.nodes += i;
            part.n_nodes = j - i;
            for (int k = 0; k < part.n_nodes; k++) {
                pinfer_match_ffn(&part, k, &f);
            }
        }
    }
    ggml_free(ctx);
    return 0;
}
