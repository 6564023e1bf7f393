// batch.cpp: the segments of a batch, and its memory.
#include "batch.h"

#include <numeric>

namespace pinfer_batch {

// Counting, then placing.
void route(shared * s, const pinfer_routes & routes, const std::vector<int64_t> & place, int64_t from, routing * out) {
    const int64_t        n_experts = (int64_t) place.size(), n_ff = s->job.n_ff;
    std::vector<int64_t> begin((size_t) n_experts + 1, 0);
    const auto           each = [&](auto && f) {
        for (int64_t t = 0; t < s->n_tokens; t++) {
            for (int64_t k = 0; k < routes.n_used; k++) {
                const int64_t at = (from + t) * routes.n_used + k;
                const int32_t e  = routes.experts[at];
                if (e >= 0 && e < n_experts && place[(size_t) e] >= 0) {
                    f(e, (int32_t) t, routes.weights[at]);
                }
            }
        }
    };
    each([&](int32_t e, int32_t, float) { begin[(size_t) e + 1]++; });
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    out->tokens.resize((size_t) begin.back());
    out->weights.resize((size_t) begin.back());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    each([&](int32_t e, int32_t t, float w) {
        const auto at    = (size_t) next[(size_t) e]++;
        out->tokens[at]  = t;
        out->weights[at] = w;
    });
    for (int64_t e = 0; e < n_experts; e++) {
        for (int64_t at = begin[(size_t) e]; at < begin[(size_t) e + 1]; at += SLAB) {
            s->segments.push_back({.n        = n_ff,
                                   .row      = e * n_ff,
                                   .down     = place[(size_t) e],
                                   .place    = s->n_neurons,
                                   .n_tokens = std::min(SLAB, begin[(size_t) e + 1] - at),
                                   .tokens   = out->tokens.data() + at,
                                   .weights  = out->weights.data() + at});
            s->n_neurons += n_ff;
        }
    }
    s->gathers = s->n_tokens > 1;
}

namespace {

// Hands out 64-byte aligned pieces of one buffer: first it measures, then it gives.
class arena {
public:
    explicit arena(uint8_t * base) : base(base) {}

    uint8_t * take(size_t size) {
        uint8_t * const at = base + used;
        used += (size + 63) / 64 * 64;
        return at;
    }

    x_view take_x(ggml_type type, int64_t n, int64_t n_tokens) {
        const size_t row = (pinfer_kernel_prepared_size(type, n) + 63) / 64 * 64;
        return {take(row * (size_t) n_tokens), row};
    }

    size_t used = 0;

private:
    uint8_t * base;
};

} // namespace

size_t lay_out(shared * s, uint8_t * base, int n_threads) {
    arena                        a(base);
    const pinfer_predictor_ffn * p = s->predictor;
    const int64_t                n_embd = s->job.n_embd;
    const int64_t                n_x    = s->n_tokens == 1 ? n_threads : s->n_tokens; // one token: a copy for each thread

    s->x_first     = a.take_x(s->first.kernel->x_type, n_embd, n_x);
    s->x_second    = s->x_first;
    s->x_predictor = s->x_first;
    if (s->second && s->second->kernel->x_type != s->first.kernel->x_type) {
        s->x_second = a.take_x(s->second->kernel->x_type, n_embd, n_x);
    }
    if (p) {
        if (predictor_x_type(*p) != s->first.kernel->x_type) {
            s->x_predictor = a.take_x(predictor_x_type(*p), n_embd, n_x);
        }
        s->z = s->x_predictor;
        if (!p->bits) {
            s->z      = a.take_x(p->b_kernel->x_type, p->rank, n_x);
            s->hidden = (float *) a.take((size_t) (s->n_tokens * p->rank) * sizeof(float));
        }
        s->candidates = (int32_t *) a.take((size_t) (s->n_neurons + 1) * sizeof(int32_t));
        s->named      = (uint32_t *) a.take((size_t) (s->n_neurons + 1) * sizeof(uint32_t));
        s->n_found    = (int64_t *) a.take(s->segments.size() * (size_t) n_threads * sizeof(int64_t));
    }
    s->own_size = pinfer_tile_size(n_embd);
    if (s->down) {
        s->partial = (float *) a.take((size_t) (n_threads * s->n_tokens * n_embd) * sizeof(float));
        s->own_size += scratch_size(n_embd);
    }
    if (s->gathers) {
        s->own_size += (size_t) SLAB * (s->x_first.row + s->x_second.row + s->x_predictor.row + (size_t) n_embd * sizeof(float));
    }
    s->own_size = (s->own_size + 63) / 64 * 64;
    s->own      = a.take((size_t) n_threads * s->own_size);
    return a.used;
}

void sum_up(const shared & s, int ith, int nth, float * y) {
    const int64_t n = s.n_tokens * s.job.n_embd, begin = n * ith / nth, end = n * (ith + 1) / nth;
    std::copy(s.partial + begin, s.partial + end, y + begin);
    for (int i = 1; i < nth; i++) {
        const float * const partial = s.partial + i * n;
        for (int64_t k = begin; k < end; k++) {
            y[k] += partial[k];
        }
    }
}

} // namespace pinfer_batch
