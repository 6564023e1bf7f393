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

static void check_ffn(const ggml_cgraph * graph, const pinfer_ffn & f) {
    int il = -1;
    require(f.layer >= 0 && f.down.mul_mat->src[1] == f.h && f.up.mul_mat->src[1] == f.x);
    require(pinfer_part_of(f.up.weight->name, false, &il) == PINFER_PART_UP && il == f.layer);
    require(pinfer_part_of(f.down.weight->name, false, &il) == PINFER_PART_DOWN && il == f.layer);
    require(!f.gated() || (f.gate.mul_mat->src[1] == f.x && pinfer_part_of(f.gate.weight->name, false, &il) == PINFER_PART_GATE));
    for (const ggml_tensor * t : {f.gate.mul_mat, f.gate.add, f.up.mul_mat, f.up.add, f.inner}) {
        require(!t || (reads(graph, t) == 1 && !(t->flags & GGML_TENSOR_FLAG_OUTPUT)));
    }
    require(f.h_is_read == (reads(graph, f.h) != 1 || (f.h->flags & GGML_TENSOR_FLAG_OUTPUT)));
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static std::vector<uint8_t> memory(1 << 20);
    ggml_context * const        ctx = ggml_init({.mem_size = memory.size(), .mem_buffer = memory.data(), .no_alloc = true});
    std::vector<ggml_tensor *>  all;
    for (int i = 0; i < 8; i++) { // leafs
        all.push_back(ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 8, 8), NAMES[i < 6 ? i : 14]));
    }
    for (size_t i = 0; i + 3 < size && all.size() < 64; i += 4) {
        ggml_tensor * const a = all[data[i + 1] % all.size()], * const b = all[data[i + 2] % all.size()];
        ggml_tensor *       t = nullptr;
        switch (data[i] % 10) {
            case 0: case 1: t = ggml_mul_mat(ctx, a, b); break;
            case 2: t = ggml_add(ctx, a, b); break;
            case 3: t = ggml_relu(ctx, a); break;
            case 4: t = ggml_sqr(ctx, a); break;
            case 5: t = ggml_swiglu_split(ctx, a, b); break;
            case 6: t = ggml_reglu_split(ctx, a, b); break;
            case 7: t = ggml_mul(ctx, a, b); break;
            case 8: t = ggml_scale(ctx, a, 2.0f); break;
            case 9: t = ggml_view_2d(ctx, a, 8, 8, a->nb[1], 0); break;
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
