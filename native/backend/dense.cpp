// dense.cpp: the dense ways: whole products by tiles of rows, or by ggml's CPU backend on the graph's own nodes where a
// type has no tiles; the activation by the model's rule.
#include "ffn.h"

#include "kernels.h"

#include <algorithm>
#include <omp.h>

// Columns of a tile: with its rows it stays in the second-level cache. A multiple of every block size.
static const int64_t TILE_COLUMNS = 4096;
// Tokens multiplied at a time: their x stays in the last-level cache.
static const int64_t TILE_TOKENS = 512;

ggml_status pinfer_dense_nodes(pinfer_engine * e, ggml_tensor * const * nodes, int n) {
    ggml_graph_clear(e->graph);
    int queued = 0;
    for (int i = 0; i < n; i++) {
        if (nodes[i]) {
            ggml_graph_add_node(e->graph, nodes[i]);
            queued++;
        }
    }
    return queued ? ggml_backend_graph_compute(e->cpu, e->graph) : GGML_STATUS_SUCCESS;
}

static inline float relu(float v) {
    return v > 0.0f ? v : 0.0f;
}

// One value of h from the gate (or, ungated, the only) product g and the up product u.
static inline float activate(pinfer_activation act, float g, float u) {
    switch (act) {
        case PINFER_ACT_RELU2:
            return relu(g) * relu(g);
        case PINFER_ACT_REGLU:
            return relu(g) * u;
        case PINFER_ACT_DRELU:
            return relu(g) * relu(u);
        default:
            return relu(g);
    }
}

void pinfer_dense_activation(const pinfer_engine * e, const pinfer_ffn & f, pinfer_activation act) {
    const float *  up   = (const float *) f.up.out()->data;
    const float *  gate = f.gated() ? (const float *) f.gate.out()->data : up;
    float *        h    = (float *) f.h->data;
    const int64_t  n    = ggml_nelements(f.h);
#pragma omp parallel for num_threads(e->n_threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        h[i] = activate(act, gate[i], up[i]);
    }
}

// Tokens and neurons of a decode step that had to be dense (no shards): the report still wants to know what fired.
static void count_active(pinfer_state * s, const pinfer_ffn & f) {
    const float * h = (const float *) f.h->data;
    const int64_t n = ggml_nelements(f.h);
    s->stats.n_tokens += (uint64_t) f.h->ne[1];
    s->stats.n_neurons += (uint64_t) n;
    s->stats.n_candidates += (uint64_t) n;
    s->stats.n_active += (uint64_t) (n - std::count(h, h + n, 0.0f));
}

namespace {

// x of one portion of tokens, prepared, and how its product with the rows of a matrix is computed by one thread.
struct tile_job {
    const pinfer_product & p;
    const pinfer_kernel *  kernel;
    int64_t                n, n_rows;
    int64_t                n_tokens;
    const uint8_t *        x;
    size_t                 x_row;
    float *                out; // [n_tokens, n_rows]
};

// Rows [row, row + PINFER_TILE_ROWS); what lies beyond the last row is computed and dropped.
void multiply_rows(const tile_job & j, int64_t row, uint8_t * tile, float * beside) {
    const int64_t n_rows  = std::min<int64_t>(PINFER_TILE_ROWS, j.n_rows - row);
    const bool    whole   = n_rows == PINFER_TILE_ROWS;
    float * const out     = whole ? j.out + row : beside;
    const int64_t out_row = whole ? j.n_rows : PINFER_TILE_ROWS;
    const float * bias    = j.p.bias ? (const float *) j.p.bias->data + row : nullptr;
    for (int64_t t = 0; t < j.n_tokens; t++) {
        for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
            out[t * out_row + r] = bias && r < n_rows ? bias[r] : 0.0f;
        }
    }
    for (int64_t begin = 0; begin < j.n; begin += TILE_COLUMNS) {
        const int64_t end = std::min(j.n, begin + TILE_COLUMNS);
        const void *  rows[PINFER_TILE_ROWS];
        for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
            rows[r] = (const uint8_t *) j.p.weight->data + (size_t) (row + std::min(r, n_rows - 1)) * j.p.weight->nb[1];
        }
        j.kernel->pack(begin, end, rows, tile);
        j.kernel->multiply(j.n, begin, end, tile, j.x, j.x_row, j.n_tokens, out, out_row);
    }
    for (int64_t t = 0; !whole && t < j.n_tokens; t++) {
        std::copy(beside + t * PINFER_TILE_ROWS, beside + t * PINFER_TILE_ROWS + n_rows, j.out + t * j.n_rows + row);
    }
}

void multiply_tiles(pinfer_engine * e, const pinfer_product & p, const pinfer_kernel * kernel, const float * x) {
    const int64_t n = p.weight->ne[0], n_rows = p.weight->ne[1], all_tokens = p.out()->ne[1];
    const int64_t most   = std::min(all_tokens, TILE_TOKENS);
    const size_t  x_row  = (pinfer_kernel_prepared_size(kernel->x_type, n) + 63) / 64 * 64;
    const size_t  tile   = pinfer_tile_size(std::min(n, TILE_COLUMNS));
    const size_t  beside = (size_t) (most * PINFER_TILE_ROWS) * sizeof(float);
    const size_t  size   = x_row * (size_t) most + (tile + beside) * (size_t) e->n_threads + 64;
    if (e->arena.size() < size) {
        e->arena.resize(size);
    }
    uint8_t * const prepared = (uint8_t *) (((uintptr_t) e->arena.data() + 63) / 64 * 64);
    uint8_t * const own      = prepared + x_row * (size_t) most; // of each thread
    for (int64_t t = 0; t < all_tokens; t += most) {
        const tile_job j = {p,        kernel, n, n_rows, std::min(most, all_tokens - t), prepared, x_row,
                            (float *) p.out()->data + t * n_rows};
#pragma omp parallel num_threads(e->n_threads)
        {
            const int ith = omp_get_thread_num(), nth = omp_get_num_threads();
            for (int64_t k = ith; k < j.n_tokens; k += nth) {
                pinfer_kernel_prepare(kernel->x_type, x + (t + k) * n, prepared + (size_t) k * x_row, n);
            }
#pragma omp barrier
            uint8_t * const mine = own + (tile + beside) * (size_t) ith;
#pragma omp for schedule(static, 4)
            for (int64_t row = 0; row < n_rows; row += PINFER_TILE_ROWS) {
                multiply_rows(j, row, mine, (float *) (mine + tile));
            }
        }
    }
}

} // namespace

ggml_status pinfer_dense_product(pinfer_engine * e, const pinfer_product & p, const float * x) {
    if (!p.mul_mat) {
        return GGML_STATUS_SUCCESS;
    }
    const pinfer_kernel * kernel = pinfer_kernel_get(p.weight->type);
    if (kernel && kernel->multiply && p.out()->ne[1] > 1) {
        multiply_tiles(e, p, kernel, x);
        return GGML_STATUS_SUCCESS;
    }
    ggml_tensor * nodes[] = {p.mul_mat, p.add};
    return pinfer_dense_nodes(e, nodes, 2);
}

ggml_status pinfer_dense_ffn(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, pinfer_activation act) {
    const float * x = (const float *) f.x->data;
    for (const pinfer_product * p : {&f.gate, &f.up}) {
        const ggml_status status = pinfer_dense_product(e, *p, x);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    // x may be gone once the nodes below are computed: the allocator reuses memory in graph order
    pinfer_dense_activation(e, f, act);
    if (s->observer.on) {
        pinfer_observer_add(&s->observer, f.layer, x, (const float *) f.h->data, f.x->ne[0], f.h->ne[0], f.x->ne[1], e->n_threads);
    }
    if (f.h->ne[1] < s->n_batch_dense) {
        count_active(s, f);
    } else {
        s->stats.n_tokens_dense += (uint64_t) f.h->ne[1];
    }
    return pinfer_dense_product(e, f.down, (const float *) f.h->data);
}
