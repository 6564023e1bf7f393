// attention_case.h: one FLASH_ATTN_EXT as llama.cpp builds it, with random numbers, for the tests and the bench of attention/.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "kernel_check.h"

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

struct attention_shape {
    int64_t   k_size = 128, v_size = 128, n_heads = 8, n_kv_heads = 8, n_tokens = 1, n_positions = 256, n_streams = 1;
    ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
    bool      one_mask = false; // for all streams
    float     max_bias = 0.0f, softcap = 0.0f;
    bool      sinks    = false;
};

// Whether a query of a stream sees a position.
typedef std::function<bool(int64_t stream, int64_t token, int64_t position)> attention_sight;

struct attention_case {
    attention_shape s;
    ggml_context *  ctx = nullptr;
    ggml_tensor *   q, *k, *v, *mask = nullptr, *op; // k and v: [size, heads, positions, streams], as the cache has them

    attention_case(const attention_shape & shape, random_source * random, const attention_sight & sees) : s(shape) {
        const auto   bytes = [&](ggml_type type, int64_t size) {
            return ggml_row_size(type, size) * (size_t) (s.n_kv_heads * s.n_positions * s.n_streams);
        };
        const size_t all = bytes(s.k_type, s.k_size) + bytes(s.v_type, s.v_size) +
                           (size_t) (s.n_streams * s.n_tokens) *
                               (4 * (size_t) (s.n_heads * (s.k_size + s.v_size)) + 2 * (size_t) s.n_positions);
        ctx = ggml_init({.mem_size = all + 32 * (ggml_tensor_overhead() + 64) + 4096, .mem_buffer = nullptr, .no_alloc = false});
        q   = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.k_size, s.n_heads, s.n_tokens, s.n_streams);
        k   = ggml_new_tensor_4d(ctx, s.k_type, s.k_size, s.n_kv_heads, s.n_positions, s.n_streams);
        v   = ggml_new_tensor_4d(ctx, s.v_type, s.v_size, s.n_kv_heads, s.n_positions, s.n_streams);
        fill(q, random, 2.0f);
        fill(k, random, 1.0f);
        fill(v, random, 1.0f);
        if (sees) {
            mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_positions, s.n_tokens, 1, s.one_mask ? 1 : s.n_streams);
            for (int64_t i = 0; i < ggml_nelements(mask); i++) {
                const int64_t row = i / s.n_positions;
                const bool    yes = sees(row / s.n_tokens, row % s.n_tokens, i % s.n_positions);
                ((ggml_fp16_t *) mask->data)[i] = yes ? 0 : 0xfc00;
            }
        }
        op = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3),
                                 ggml_permute(ctx, v, 0, 2, 1, 3), mask, 1.0f / sqrtf((float) s.k_size), s.max_bias, s.softcap);
        if (s.sinks) {
            ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, s.n_heads);
            fill(sinks, random, 1.0f);
            ggml_flash_attn_ext_add_sinks(op, sinks);
        }
        ggml_prec_set_acc(op, GGML_PREC_F32);
    }

    attention_case(const attention_case &) = delete;
    attention_case & operator=(const attention_case &) = delete;

    ~attention_case() { ggml_free(ctx); }

    static void fill(ggml_tensor * t, random_source * random, float deviation) {
        const int64_t      n = t->ne[0];
        std::vector<float> row((size_t) n);
        for (int64_t i = 0; i < ggml_nrows(t); i++) {
            for (float & f : row) { // as wide as a normal distribution, and much cheaper
                f = deviation * 3.4641016f * ((float) random->next() / 4294967296.0f - 0.5f);
            }
            void * to = (char *) t->data + (size_t) i * t->nb[1];
            if (t->type == GGML_TYPE_F32) {
                memcpy(to, row.data(), (size_t) n * sizeof(float));
            } else {
                ggml_quantize_chunk(t->type, row.data(), to, 0, 1, n, nullptr);
            }
        }
    }

    size_t cache_bytes() const { return ggml_nbytes(k) + ggml_nbytes(v); }
    size_t n_out() const { return (size_t) ggml_nelements(op); }
};

// ggml's CPU backend, which asks the hook.
struct attention_runner {
    ggml_backend_t cpu = ggml_backend_cpu_init();

    ~attention_runner() { ggml_backend_free(cpu); }

    void compute(const std::vector<ggml_tensor *> & ops, int n_threads) {
        const size_t   size = 16 * ops.size();
        ggml_context * ctx  = ggml_init({.mem_size   = ggml_graph_overhead_custom(size, false) + 1024,
                                         .mem_buffer = nullptr,
                                         .no_alloc   = true});
        ggml_cgraph *  g    = ggml_new_graph_custom(ctx, size, false);
        for (ggml_tensor * op : ops) {
            ggml_build_forward_expand(g, op);
        }
        ggml_backend_cpu_set_n_threads(cpu, n_threads);
        ggml_backend_graph_compute(cpu, g);
        ggml_free(ctx);
    }

    std::vector<float> compute(const attention_case & c, int n_threads) {
        memset(c.op->data, 0x7f, ggml_nbytes(c.op));
        compute({c.op}, n_threads);
        const float * out = (const float *) c.op->data;
        return {out, out + c.n_out()};
    }
};
