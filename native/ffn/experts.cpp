// experts.cpp: experts as they are, with llama.cpp's products: nothing in them is zero, so nothing can be skipped.
#include "experts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <omp.h>

namespace {

// Squared error of products, as a share of their square, up to which weights are taken for the same. Layouts differ in the order of
// their sums, and in how finely they round x; other weights are off by about 2.
const double SAME_PRODUCTS = 1e-2;

// A contiguous tensor outside of any context.
ggml_tensor tensor_at(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void * data) {
    ggml_tensor t = {};
    t.type        = type;
    t.data        = const_cast<void *>(data);
    const int64_t ne[] = {ne0, ne1, ne2, 1};
    size_t        size = ggml_type_size(type);
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        t.ne[i] = ne[i];
        t.nb[i] = size;
        size    = i == 0 ? ggml_row_size(type, ne0) : size * (size_t) ne[i];
    }
    return t;
}

// A node like one of the graph, of another shape, from other sources.
ggml_tensor node_like(const ggml_tensor * node, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, int64_t ne1, int64_t ne2,
                      float * data) {
    ggml_tensor t = tensor_at(GGML_TYPE_F32, node->ne[0], ne1, ne2, data);
    t.op          = node->op;
    t.flags       = GGML_TENSOR_FLAG_COMPUTE; // what building a graph would do
    std::copy(std::begin(node->op_params), std::end(node->op_params), t.op_params);
    t.src[0] = a;
    t.src[1] = b;
    t.src[2] = c;
    return t;
}

// The products of one expert's matrix with x.
bool product_of(pinfer_team * team, const ggml_tensor * node, ggml_tensor * weight, int32_t expert, std::vector<float> & x,
                std::vector<float> * out) {
    ggml_tensor input = tensor_at(GGML_TYPE_F32, weight->ne[0], 1, 1, x.data()), ids = tensor_at(GGML_TYPE_I32, 1, 1, 1, &expert);
    out->resize((size_t) weight->ne[1]);
    ggml_tensor   y = node_like(node, weight, &input, &ids, 1, 1, out->data());
    ggml_tensor * nodes[] = {&y};
    return pinfer_team_nodes(team, nodes, 1) == GGML_STATUS_SUCCESS;
}

bool same_products(pinfer_team * team, const pinfer_hot & hot, const pinfer_product & p, const ggml_tensor * t, int32_t expert) {
    pinfer_blob blob;
    std::string ignored;
    if (t->type != p.weight->type || !pinfer_artefact_tensor(&hot.file, t->name, t->type, t->ne[0], t->ne[1], &blob, &ignored, t->ne[2])) {
        return false;
    }
    std::vector<float> x((size_t) t->ne[0]), found, wanted;
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = (float) std::sin(1.0 + 0.7 * (double) i);
    }
    ggml_tensor of_shard = tensor_at(t->type, t->ne[0], t->ne[1], t->ne[2], blob.data);
    if (!product_of(team, p.mul_mat, p.weight, expert, x, &found) || !product_of(team, p.mul_mat, &of_shard, 0, x, &wanted)) {
        return false;
    }
    double error = 0.0, size = 0.0;
    for (size_t i = 0; i < wanted.size(); i++) {
        error += std::pow((double) found[i] - wanted[i], 2);
        size += std::pow((double) wanted[i], 2);
    }
    return error <= SAME_PRODUCTS * size;
}

bool same_bias(const pinfer_hot & hot, const pinfer_product & p, const ggml_tensor * t, int32_t expert) {
    if (!p.bias || !t) {
        return !p.bias && !t;
    }
    pinfer_blob        blob;
    std::string        ignored;
    const size_t       size = (size_t) t->ne[0] * sizeof(float);
    std::vector<float> found((size_t) t->ne[0]);
    if (p.bias->type != GGML_TYPE_F32 || p.bias->ne[0] != t->ne[0] || p.bias->ne[1] != p.weight->ne[2] ||
        !pinfer_artefact_tensor(&hot.file, t->name, t->type, t->ne[0], t->ne[1], &blob, &ignored)) {
        return false;
    }
    ggml_backend_tensor_get(p.bias, found.data(), (size_t) expert * p.bias->nb[1], size);
    return memcmp(found.data(), blob.data, size) == 0;
}

// Whether the first expert of a shard is that of the stack in memory.
bool same_expert(pinfer_team * team, const pinfer_hot & hot, const pinfer_product & p, const ggml_tensor * t, const ggml_tensor * bias,
                 int32_t expert) {
    return same_bias(hot, p, bias, expert) && same_products(team, hot, p, t, expert);
}

// The pairs of a token and an expert that are computed here, in the order of the tokens and of their experts.
struct pairs {
    std::vector<int32_t> experts;
    std::vector<float>   weights;
    std::vector<int64_t> tokens;
    std::vector<int64_t> first; // [n_tokens + 1] pairs of the tokens before

    int64_t size() const { return (int64_t) experts.size(); }
};

pairs pairs_here(const pinfer_model & m, const pinfer_ffn & f, const pinfer_routes & routes) {
    const int64_t n_experts = f.up.weight->ne[2];
    std::vector<bool> is_hot((size_t) n_experts);
    for (const auto & hot : m.hot) {
        const pinfer_hot_ffn & layer = hot->ffns[(size_t) f.index];
        for (int64_t j = 0; j < layer.n; j++) {
            is_hot[(size_t) layer.ids[j]] = true;
        }
    }
    pairs p;
    for (int64_t t = 0; t < f.n_tokens(); t++) {
        p.first.push_back(p.size());
        for (int64_t k = t * routes.n_used; k < (t + 1) * routes.n_used; k++) {
            const int32_t e = routes.experts[(size_t) k];
            if (e >= 0 && e < n_experts && !is_hot[(size_t) e]) {
                p.experts.push_back(e);
                p.weights.push_back(routes.weights[(size_t) k]);
                p.tokens.push_back(t);
            }
        }
    }
    p.first.push_back(p.size());
    return p;
}

// From this many tokens on pairs are arranged in rows of several.
const int64_t LONG_BATCH = 32;

// Pairs in a row of the products, as if they were the experts of one token: ggml prepares the inputs of a row by all threads. Some
// of its kernels have room for no more pairs of an expert than there are rows, so there are not fewer rows than tokens. The last
// row is filled up with pairs whose output nobody reads.
int64_t arrange(pairs * p, int64_t n_tokens) {
    if (n_tokens == 1) {
        return std::max<int64_t>(p->size(), 1);
    }
    const int64_t width = n_tokens < LONG_BATCH ? 1 : std::max<int64_t>(p->size() / n_tokens, 1);
    for (int32_t e = 0; p->size() % width != 0; e++) { // an expert once
        p->experts.push_back(e);
        p->tokens.push_back(0);
    }
    return width;
}

// sum [n_embd] = the outputs y of a token's pairs, times their weights.
void sum_token(const pairs & p, int64_t token, const float * y, int64_t n_embd, float * sum) {
    std::fill(sum, sum + n_embd, 0.0f);
    for (int64_t k = p.first[(size_t) token]; k < p.first[(size_t) token + 1]; k++) {
        for (int64_t i = 0; i < n_embd; i++) {
            sum[i] += p.weights[(size_t) k] * y[k * n_embd + i];
        }
    }
}

} // namespace

bool pinfer_experts_are_of(pinfer_team * team, const pinfer_model & m, const pinfer_ffn & f) {
    return std::all_of(m.hot.begin(), m.hot.end(), [&](const auto & hot) {
        const pinfer_hot_ffn & layer = hot->ffns[(size_t) f.index];
        return layer.n == 0 || (same_expert(team, *hot, f.gate, layer.gate, layer.gate_bias, layer.ids[0]) &&
                                same_expert(team, *hot, f.up, layer.up, layer.up_bias, layer.ids[0]) &&
                                same_expert(team, *hot, f.down, layer.down, layer.down_bias, layer.ids[0]));
    });
}

ggml_status pinfer_experts_compute(pinfer_team * team, const pinfer_model & m, const pinfer_ffn & f, const pinfer_routes & routes,
                                   const float * x, uint64_t * n) {
    pairs         p      = pairs_here(m, f, routes);
    const int64_t n_embd = f.x->ne[0], n_ff = f.h->ne[0], n_tokens = f.n_tokens();
    *n                   = (uint64_t) p.size();
    const int64_t width  = arrange(&p, n_tokens), rows = p.size() / width, n_pairs = p.size();
    // x of each pair, and later its output; the experts of a single token share one x
    float * const y    = (float *) pinfer_team_arena(team, (size_t) (n_pairs * (n_embd + 2 * n_ff)) * sizeof(float));
    float * const up   = y + n_pairs * n_embd;
    float * const gate = up + n_pairs * n_ff;
    ggml_status status = GGML_STATUS_SUCCESS;
    if (n_pairs > 0) {
        const bool alone = n_tokens == 1;
#pragma omp parallel for num_threads(team->n_threads) schedule(static) if (n_pairs * n_embd > (1 << 16))
        for (int64_t i = 0; i < (alone ? 0 : n_pairs); i++) {
            std::copy(x + p.tokens[(size_t) i] * n_embd, x + (p.tokens[(size_t) i] + 1) * n_embd, y + i * n_embd);
        }
        ggml_tensor input = tensor_at(GGML_TYPE_F32, n_embd, alone ? 1 : width, rows, alone ? x : y);
        ggml_tensor ids   = tensor_at(GGML_TYPE_I32, width, rows, 1, p.experts.data());
        std::array<ggml_tensor, 7> made;
        std::vector<ggml_tensor *> nodes;
        const auto add = [&](const ggml_tensor * node, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c, float * out) {
            made[nodes.size()] = node_like(node, a, b, c, width, rows, out);
            nodes.push_back(&made[nodes.size()]);
            return nodes.back();
        };
        const auto product = [&](const pinfer_product & of, ggml_tensor * from, float * out) {
            ggml_tensor * const t = add(of.mul_mat, of.weight, from, &ids, out);
            return of.add ? add(of.add, t, of.bias, &ids, out) : t;
        };
        ggml_tensor * const u = product(f.up, &input, up);
        ggml_tensor * const g = product(f.gate, &input, gate);
        product(f.down, add(f.h, g, u, nullptr, gate), y);
        status = pinfer_team_nodes(team, nodes.data(), (int) nodes.size());
    }
    float * const out = (float *) f.out()->data;
#pragma omp parallel for num_threads(team->n_threads) schedule(static) if (n_tokens > 1)
    for (int64_t t = 0; t < n_tokens; t++) {
        sum_token(p, t, y, n_embd, out + t * n_embd);
    }
    return status;
}
