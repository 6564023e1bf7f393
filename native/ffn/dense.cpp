// dense.cpp: the dense ways: whole products by tiles of rows, or by ggml's CPU backend on the graph's own nodes where a
// type has no tiles; the activation by the model's rule.
#include "dense.h"

#include "kernels.h"

#include <algorithm>
#include <omp.h>

// Columns of a tile: with its rows it stays in the second-level cache. A multiple of every block size.
static const int64_t TILE_COLUMNS = 4096;
// Tokens multiplied at a time: their x stays in the last-level cache.
static const int64_t TILE_TOKENS = 512;

// h of n products; gate is up where the FFN has no gate.
static void activate_all(const pinfer_team * team, pinfer_rule rule, const float * gate, const float * up, float * h, int64_t n) {
#pragma omp parallel for num_threads(team->n_threads) schedule(static) firstprivate(rule) // h might be it otherwise
    for (int64_t i = 0; i < n; i++) {
        h[i] = pinfer_activate(rule, gate[i], up[i]);
    }
}

void pinfer_dense_activation(const pinfer_team * team, const pinfer_ffn & f, const pinfer_rule & rule) {
    const float * up = (const float *) f.up.out()->data;
    activate_all(team, rule, f.gated() ? (const float *) f.gate.out()->data : up, up, (float *) f.h->data, ggml_nelements(f.h));
}

// The report wants to know what fired, also in a decode step that had to be dense (no shards).
static void account(pinfer_model * m, const pinfer_ffn & f) {
    const int64_t n_tokens = f.n_tokens();
    if (n_tokens >= m->settings.n_batch_dense) {
        m->stats.n_tokens_dense += (uint64_t) n_tokens;
        return;
    }
    const int64_t n = (f.is_stack() ? (int64_t) f.views.size() : 1) * f.h->ne[0]; // of a token; warming up takes all experts
    for (int64_t t = 0; t < n_tokens; t++) {
        const float * h = (const float *) ((const char *) f.h->data + (size_t) t * f.h->nb[f.is_stack() ? 2 : 1]);
        m->stats.n_active += (uint64_t) (n - std::count(h, h + n, 0.0f));
    }
    m->stats.n_tokens += (uint64_t) n_tokens;
    m->stats.n_neurons += (uint64_t) (n * n_tokens);
    m->stats.n_candidates += (uint64_t) (n * n_tokens);
}

namespace {

// x of one portion of tokens, prepared, and the rows it is multiplied with.
struct tile_job {
    const pinfer_rows & rows;
    int64_t             n, n_rows;
    int64_t             n_tokens;
    const uint8_t *     x;
    size_t              x_row;
    float *             out; // [n_tokens, n_rows]
};

// Rows [row, row + PINFER_TILE_ROWS); what lies beyond the last row is computed and dropped.
void multiply_rows(const tile_job & j, int64_t row, uint8_t * tile, float * beside) {
    const int64_t n_rows  = std::min<int64_t>(PINFER_TILE_ROWS, j.n_rows - row);
    const bool    whole   = n_rows == PINFER_TILE_ROWS;
    float * const out     = whole ? j.out + row : beside;
    const int64_t out_row = whole ? j.n_rows : PINFER_TILE_ROWS;
    const void *  rows[PINFER_TILE_ROWS];
    for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
        rows[r] = j.rows.data + (size_t) (row + std::min(r, n_rows - 1)) * j.rows.stride;
    }
    for (int64_t t = 0; t < j.n_tokens; t++) {
        for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
            out[t * out_row + r] = j.rows.bias && r < n_rows ? j.rows.bias[row + r] : 0.0f;
        }
    }
    for (int64_t begin = 0; begin < j.n; begin += TILE_COLUMNS) {
        const int64_t end = std::min(j.n, begin + TILE_COLUMNS);
        j.rows.kernel->pack(begin, end, rows, tile);
        j.rows.kernel->multiply(j.n, begin, end, tile, j.x, j.x_row, j.n_tokens, out, out_row);
    }
    for (int64_t t = 0; !whole && t < j.n_tokens; t++) {
        std::copy(beside + t * PINFER_TILE_ROWS, beside + t * PINFER_TILE_ROWS + n_rows, j.out + t * j.n_rows + row);
    }
}

// One token: its rows are not worth packing.
void dot_rows(const tile_job & j, int64_t row) {
    for (int64_t r = row; r < std::min(j.n_rows, row + PINFER_TILE_ROWS); r++) {
        const float dot = pinfer_kernel_dot(j.rows.kernel, j.n, j.rows.data + (size_t) r * j.rows.stride, j.x);
        j.out[r]        = dot + (j.rows.bias ? j.rows.bias[r] : 0.0f);
    }
}

void multiply_tiles(pinfer_team * team, const pinfer_rows & rows, int64_t n, int64_t n_rows, const float * x, int64_t n_tokens,
                    float * out) {
    const pinfer_kernel * kernel = rows.kernel;
    const int64_t         most   = std::min(n_tokens, TILE_TOKENS);
    const size_t          x_row  = (pinfer_kernel_prepared_size(kernel->x_type, n) + 63) / 64 * 64;
    const size_t          tile   = pinfer_tile_size(std::min(n, TILE_COLUMNS));
    const size_t          beside = (size_t) (most * PINFER_TILE_ROWS) * sizeof(float);
    uint8_t * const       x_all  = pinfer_team_arena(team, x_row * (size_t) most + (tile + beside) * (size_t) team->n_threads);
    uint8_t * const       own    = x_all + x_row * (size_t) most; // of each thread
    for (int64_t t = 0; t < n_tokens; t += most) {
        const tile_job j = {rows, n, n_rows, std::min(most, n_tokens - t), x_all, x_row, out + t * n_rows};
#pragma omp parallel num_threads(team->n_threads)
        {
            const int ith = omp_get_thread_num(), nth = omp_get_num_threads();
            for (int64_t k = ith; k < j.n_tokens; k += nth) {
                pinfer_kernel_prepare(kernel->x_type, x + (t + k) * n, x_all + (size_t) k * x_row, n);
            }
#pragma omp barrier
            uint8_t * const mine = own + (tile + beside) * (size_t) ith;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < n_rows; row += PINFER_TILE_ROWS) {
                if (n_tokens == 1) {
                    dot_rows(j, row);
                } else {
                    multiply_rows(j, row, mine, (float *) (mine + tile));
                }
            }
        }
    }
}

// By ggml, from tensors made for this one product.
ggml_status multiply_ggml(pinfer_team * team, const pinfer_rows & rows, int64_t n, int64_t n_rows, const float * x, int64_t n_tokens,
                          float * out) {
    std::vector<uint8_t> memory(4 * ggml_tensor_overhead()); // ggml's own allocation would abort
    ggml_context *       ctx = ggml_init({.mem_size = memory.size(), .mem_buffer = memory.data(), .no_alloc = true});
    ggml_tensor *    w      = ggml_new_tensor_2d(ctx, rows.kernel->type, n, n_rows);
    ggml_tensor *    v      = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n_tokens);
    ggml_tensor *    y      = ggml_mul_mat(ctx, w, v);
    w->data = const_cast<uint8_t *>(rows.data);
    v->data = const_cast<float *>(x);
    y->data = out;
    y->flags |= GGML_TENSOR_FLAG_COMPUTE; // what building a graph from y would do
    const ggml_status status = pinfer_team_nodes(team, &y, 1);
    ggml_free(ctx);
    if (rows.bias) {
        pinfer_dense_add(team, out, rows.bias, n_rows, n_tokens, out);
    }
    return status;
}

} // namespace

// The products of n_rows rows, from x [n_tokens, n] into out [n_tokens, n_rows].
static ggml_status dense_rows(pinfer_team * team, const pinfer_rows & rows, int64_t n, int64_t n_rows, const float * x,
                              int64_t n_tokens, float * out) {
    if (!rows.kernel->multiply) {
        return multiply_ggml(team, rows, n, n_rows, x, n_tokens, out);
    }
    multiply_tiles(team, rows, n, n_rows, x, n_tokens, out);
    return GGML_STATUS_SUCCESS;
}

ggml_status pinfer_dense_product(pinfer_team * team, pinfer_model * m, const pinfer_product & p, const float * x) {
    if (!p.mul_mat) {
        return GGML_STATUS_SUCCESS;
    }
    const pinfer_rows rows = pinfer_model_rows(m, p);
    float * const     out  = (float *) p.out()->data;
    if (rows.kernel && rows.kernel->multiply) {
        return dense_rows(team, rows, p.weight->ne[0], p.weight->ne[1], x, p.out()->ne[1], out);
    }
    const ggml_status status = pinfer_team_nodes(team, &p.mul_mat, 1);
    if (rows.bias) {
        pinfer_dense_add(team, (const float *) p.mul_mat->data, rows.bias, p.weight->ne[1], p.out()->ne[1], out);
    }
    return status;
}

const float * pinfer_dense_bias(pinfer_model * m, const ggml_tensor * bias) {
    if (!bias || bias->type == GGML_TYPE_F32) {
        return bias ? (const float *) bias->data : nullptr;
    }
    std::vector<float> & values = m->biases[bias->data];
    if (values.empty()) {
        values.resize((size_t) bias->ne[0]);
        ggml_get_type_traits(bias->type)->to_float(bias->data, values.data(), bias->ne[0]);
    }
    return values.data();
}

void pinfer_dense_add(const pinfer_team * team, const float * in, const float * bias, int64_t n, int64_t n_tokens, float * out) {
#pragma omp parallel for num_threads(team->n_threads) schedule(static) if (n * n_tokens > (1 << 16))
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t k = 0; k < n; k++) {
            out[t * n + k] = in[t * n + k] + bias[k];
        }
    }
}

pinfer_rows pinfer_model_rows(pinfer_model * m, const pinfer_product & p) {
    if (!p.mul_mat) {
        return {};
    }
    return {
        .data   = (const uint8_t *) p.weight->data,
        .stride = p.weight->nb[1],
        .kernel = pinfer_kernel_get(p.weight->type),
        .bias   = pinfer_dense_bias(m, p.bias),
    };
}

// Tokens [begin, end) of y += h times the down rows, of which most are multiplied by zero: 16 rows at a time for tokens that
// share the work of unpacking them. scratch has room for n values.
static void sum_down(const pinfer_neurons & neurons, const float * h, int64_t n, float * y, int64_t begin, int64_t end,
                     float * scratch) {
    const int64_t most = 128;
    float         factor[PINFER_TILE_ROWS * most];
    for (int64_t t0 = begin; t0 < end; t0 += most) {
        const int64_t n_tokens = std::min(most, end - t0);
        std::fill(y + t0 * n, y + (t0 + n_tokens) * n, 0.0f);
        for (int64_t j = 0; j < neurons.n; j += PINFER_TILE_ROWS) {
            const int64_t n_rows = std::min<int64_t>(PINFER_TILE_ROWS, neurons.n - j);
            const void *  rows[PINFER_TILE_ROWS];
            for (int64_t r = 0; r < n_rows; r++) {
                rows[r] = neurons.down.data + (size_t) (j + r) * neurons.down.stride;
            }
            for (int64_t t = 0; t < n_tokens; t++) {
                for (int64_t r = 0; r < n_rows; r++) {
                    factor[(size_t) (r * n_tokens + t)] = h[(t0 + t) * neurons.n + j + r];
                }
            }
            pinfer_kernel_accumulate(neurons.down.kernel, n, n_rows, rows, factor, n_tokens, y + t0 * n, scratch);
        }
    }
}

ggml_status pinfer_dense_neurons(pinfer_team * team, const pinfer_ffn & f, const pinfer_neurons & neurons, const pinfer_rule & rule,
                                 const float * x) {
    const int64_t n_embd = f.x->ne[0], n_tokens = f.x->ne[1];
    float * const up     = (float *) f.up.out()->data;
    float * const gate   = f.gated() ? (float *) f.gate.out()->data : up;
    float * const h      = (float *) f.h->data;
    float * const y      = (float *) f.down.out()->data;
    ggml_status   status = GGML_STATUS_SUCCESS;
    if (f.gated()) {
        status = dense_rows(team, neurons.gate, n_embd, neurons.n, x, n_tokens, gate);
    }
    if (status == GGML_STATUS_SUCCESS) {
        status = dense_rows(team, neurons.up, n_embd, neurons.n, x, n_tokens, up);
    }
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    activate_all(team, rule, gate, up, h, neurons.n * n_tokens);
    float * const scratch = (float *) pinfer_team_arena(team, (size_t) (team->n_threads * n_embd) * sizeof(float));
#pragma omp parallel num_threads(team->n_threads)
    {
        const int ith = omp_get_thread_num(), nth = omp_get_num_threads();
        sum_down(neurons, h, n_embd, y, n_tokens * ith / nth, n_tokens * (ith + 1) / nth, scratch + ith * n_embd);
    }
    return GGML_STATUS_SUCCESS;
}

pinfer_routes pinfer_routes_of(const pinfer_ffn & f) {
    pinfer_routes r = {.n_used = (int64_t) f.views.size(), .experts = {}, .weights = {}};
    for (int64_t t = 0; t < f.n_tokens(); t++) {
        for (int64_t k = 0; k < r.n_used; k++) {
            const ggml_tensor * const e = f.experts, * const w = f.weights;
            r.experts.push_back(*(const int32_t *) ((const char *) e->data + (size_t) t * e->nb[1] + (size_t) k * e->nb[0]));
            r.weights.push_back(*(const float *) ((const char *) w->data + (size_t) t * w->nb[2] + (size_t) k * w->nb[1]));
        }
    }
    return r;
}

// ggml's own products of a stack: it knows which experts are needed.
static ggml_status dense_stack(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, const pinfer_rule & rule) {
    const pinfer_routes routes = pinfer_routes_of(f);
    ggml_tensor * const products[] = {f.up.mul_mat, f.gate.mul_mat};
    std::vector<float>  x; // may be gone once the nodes below are computed
    if (m->observer.on) {
        x.assign((const float *) f.x->data, (const float *) f.x->data + ggml_nelements(f.x));
    }
    const ggml_status status = pinfer_team_nodes(team, products, 2);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    pinfer_dense_activation(team, f, rule);
    if (m->observer.on) {
        pinfer_observer_add(&m->observer,
                            {.ffn = f.index, .x = x.data(), .h = (const float *) f.h->data, .n_embd = f.x->ne[0], .n_ff = f.h->ne[0],
                             .n_tokens = f.n_tokens(), .n_experts = f.up.weight->ne[2], .n_used = routes.n_used,
                             .experts = routes.experts.data(), .h_token = (int64_t) (f.h->nb[2] / sizeof(float))},
                            team->n_threads);
    }
    account(m, f);
    std::vector<ggml_tensor *> rest = {f.down.mul_mat, f.weighted};
    rest.insert(rest.end(), f.sums.begin(), f.sums.end());
    return pinfer_team_nodes(team, rest.data(), (int) rest.size());
}

ggml_status pinfer_dense_ffn(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, const pinfer_rule & rule) {
    if (f.is_stack()) {
        return dense_stack(team, m, f, rule);
    }
    const float * x = (const float *) f.x->data;
    for (const pinfer_product * p : {&f.gate, &f.up}) {
        const ggml_status status = pinfer_dense_product(team, m, *p, x);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    // x may be gone once the nodes below are computed: the allocator reuses memory in graph order
    pinfer_dense_activation(team, f, rule);
    if (m->observer.on) {
        const int64_t n_ff = f.h->ne[0];
        pinfer_observer_add(&m->observer,
                            {.ffn = f.index, .x = x, .h = (const float *) f.h->data, .n_embd = f.x->ne[0], .n_ff = n_ff,
                             .n_tokens = f.n_tokens(), .h_token = n_ff},
                            team->n_threads);
    }
    account(m, f);
    return pinfer_dense_product(team, m, f.down, (const float *) f.h->data); // of half an FFN there is none
}
