// observer.cpp: each thread owns a range of neurons, so counting needs no atomics and has one order of summation.
#include "observer.h"

#include "ggml.h"

#include <cmath>

// Neurons a thread takes at a time: a multiple of 8, so that no two threads share a byte of the activity bits.
static const int64_t BLOCK = 256;

void pinfer_observer_add(pinfer_observer * o, int il, const float * x, const float * h, int64_t n_embd, int64_t n_ff,
                         int64_t n_tokens, int n_threads) {
    if ((size_t) il >= o->layers.size()) {
        o->layers.resize((size_t) il + 1);
    }
    pinfer_observer_store & s = o->layers[(size_t) il];
    s.n_ff   = (uint64_t) n_ff;
    s.n_embd = (uint64_t) n_embd;
    s.count.resize(s.n_ff);
    s.mass.resize(s.n_ff);

    const uint64_t       bits = (s.n_ff + 7) / 8;
    std::vector<int64_t> sample_of((size_t) n_tokens, -1);
    for (int64_t t = 0; t < n_tokens; t++) {
        if (s.n_samples < o->max_samples && (s.n_tokens + (uint64_t) t) % o->stride == 0) {
            sample_of[(size_t) t] = (int64_t) s.n_samples++;
        }
    }
    s.x.resize(s.n_samples * s.n_embd);
    s.active.resize(s.n_samples * bits);
    for (int64_t t = 0; t < n_tokens; t++) {
        if (sample_of[(size_t) t] >= 0) {
            ggml_fp32_to_fp16_row(x + t * n_embd, (ggml_fp16_t *) s.x.data() + sample_of[(size_t) t] * n_embd, n_embd);
        }
    }

#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t block = 0; block < n_ff; block += BLOCK) {
        const int64_t end = block + BLOCK < n_ff ? block + BLOCK : n_ff;
        for (int64_t t = 0; t < n_tokens; t++) {
            const float *   row  = h + t * n_ff;
            const int64_t   k    = sample_of[(size_t) t];
            uint8_t * const mask = k >= 0 ? s.active.data() + (uint64_t) k * bits : nullptr;
            for (int64_t i = block; i < end; i++) {
                if (row[i] != 0.0f) {
                    s.count[(size_t) i]++;
                    s.mass[(size_t) i] += std::fabs(row[i]);
                    if (mask) {
                        mask[i / 8] |= (uint8_t) (1u << (i % 8));
                    }
                }
            }
        }
    }
    s.n_tokens += (uint64_t) n_tokens;
}
