// observer.cpp: each thread owns a range of neurons, so counting needs no atomics and has one order of summation.
#include "observer.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>

// Neurons a thread takes at a time: a multiple of 8, so that no two threads share a byte of the activity bits.
static const int64_t BLOCK = 256;

// The numbers among the samples of those tokens that are kept, -1 for the others; their x is kept.
static std::vector<int64_t> sample(const pinfer_observer * o, pinfer_observer_store * s, const pinfer_observed & seen) {
    std::vector<int64_t> sample_of((size_t) seen.n_tokens, -1);
    for (int64_t t = 0; t < seen.n_tokens; t++) {
        if (s->n_samples < o->max_samples && (s->n_tokens + (uint64_t) t) % o->stride == 0) {
            sample_of[(size_t) t] = (int64_t) s->n_samples++;
        }
    }
    s->x.resize(s->n_samples * s->n_embd);
    for (int64_t t = 0; t < seen.n_tokens; t++) {
        if (sample_of[(size_t) t] >= 0) {
            ggml_fp32_to_fp16_row(seen.x + t * seen.n_embd, (ggml_fp16_t *) s->x.data() + sample_of[(size_t) t] * seen.n_embd,
                                  seen.n_embd);
        }
    }
    return sample_of;
}

// Where the tokens were routed to.
static void add_routes(pinfer_observer_store * s, const pinfer_observed & seen, const std::vector<int64_t> & sample_of) {
    s->n_used = (uint64_t) seen.n_used;
    s->routed.resize((size_t) seen.n_experts);
    s->experts.resize(s->n_samples * s->n_used);
    for (int64_t t = 0; t < seen.n_tokens; t++) {
        const int32_t * const experts = seen.experts + t * seen.n_used;
        for (int64_t k = 0; k < seen.n_used; k++) {
            s->routed[(size_t) experts[k]]++;
        }
        if (sample_of[(size_t) t] >= 0) {
            std::copy(experts, experts + seen.n_used, s->experts.begin() + sample_of[(size_t) t] * seen.n_used);
        }
    }
}

void pinfer_observer_add(pinfer_observer * o, const pinfer_observed & seen, int n_threads) {
    if ((size_t) seen.ffn >= o->ffns.size()) {
        o->ffns.resize((size_t) seen.ffn + 1);
    }
    pinfer_observer_store & s        = o->ffns[(size_t) seen.ffn];
    const int64_t           n_ff     = seen.n_ff;
    const bool              is_stack = seen.experts != nullptr;
    s.n_embd                         = (uint64_t) seen.n_embd;
    s.count.resize((size_t) (n_ff * std::max<int64_t>(1, seen.n_experts)));
    s.mass.resize(s.count.size());

    const uint64_t             bits      = ((uint64_t) n_ff + 7) / 8;
    const std::vector<int64_t> sample_of = sample(o, &s, seen);
    if (is_stack) {
        add_routes(&s, seen, sample_of);
    } else {
        s.active.resize(s.n_samples * bits);
    }
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t block = 0; block < n_ff; block += BLOCK) {
        const int64_t end = std::min(n_ff, block + BLOCK);
        for (int64_t t = 0; t < seen.n_tokens; t++) {
            const int64_t   k    = sample_of[(size_t) t];
            uint8_t * const mask = k >= 0 && !is_stack ? s.active.data() + (uint64_t) k * bits : nullptr;
            for (int64_t u = 0; u < seen.n_used; u++) {
                const float * const row   = seen.h + t * seen.h_token + u * n_ff;
                const int64_t       first = is_stack ? seen.experts[t * seen.n_used + u] * n_ff : 0;
                for (int64_t i = block; i < end; i++) {
                    if (row[i] != 0.0f) {
                        s.count[(size_t) (first + i)]++;
                        s.mass[(size_t) (first + i)] += std::fabs(row[i]);
                        if (mask) {
                            mask[i / 8] |= (uint8_t) (1u << (i % 8));
                        }
                    }
                }
            }
        }
    }
    s.n_tokens += (uint64_t) seen.n_tokens;
}
