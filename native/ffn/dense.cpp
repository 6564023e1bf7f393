// dense.cpp: the dense ways: whole products by tiles of rows, or by ggml's CPU backend on the graph's own nodes where a
// type has no tiles; the activation by the model's rule.
#include "dense.h"

#include "kernels.h"

#include <algorithm>
#include <bit>
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

namespace {

// Tokens whose sums are kept at hand while all down rows go by, of PINFER_SUM_COLUMNS columns: half of a second-level cache.
const int64_t SUM_TOKENS = 256;

// y = h times the down rows, most of which are multiplied by zero. Of h there is what is not, token by token, and a bit for each
// neuron.
struct sum_job {
    const pinfer_neurons & neurons;
    const float *          h; // [n_tokens, neurons.n], each token's values in front
    const uint64_t *       bits; // [n_tokens, n_words]
    int64_t                n_words;
    int64_t                n; // columns
    float *                y; // [n_tokens, n]
};

// Of PINFER_SUM_ROWS unpacked rows, and for types that are unpacked by ggml.
const size_t SUM_SCRATCH = (PINFER_SUM_ROWS + 1) * PINFER_SUM_COLUMNS * sizeof(float);

// Columns [at, at + width) of n_tokens tokens from t.
void sum_block(const sum_job & j, int64_t at, int64_t width, int64_t t, int64_t n_tokens, float * scratch) {
    const pinfer_rows & down = j.neurons.down;
    float * const       y    = j.y + t * j.n + at;
    const float *       h[SUM_TOKENS];
    for (int64_t k = 0; k < n_tokens; k++) {
        std::fill_n(y + k * j.n, width, 0.0f);
        h[k] = j.h + (t + k) * j.neurons.n;
    }
    for (int64_t word = 0; word < j.n_words; word++) {
        uint64_t rows[SUM_TOKENS], needed = 0;
        for (int64_t k = 0; k < n_tokens; k++) {
            rows[k] = j.bits[(t + k) * j.n_words + word];
            needed |= rows[k];
        }
        for (uint64_t left = needed; left; left &= left - 1) {
            const int64_t r   = std::countr_zero(left);
            float * const row = scratch + r * width;
            std::fill_n(row, width, 0.0f);
            pinfer_kernel_axpy(down.kernel, width, 1.0f,
                               down.data + (size_t) (word * PINFER_SUM_ROWS + r) * down.stride + ggml_row_size(down.kernel->type, at),
                               row, scratch + PINFER_SUM_ROWS * PINFER_SUM_COLUMNS);
        }
        pinfer_kernel_add_rows(width, scratch, rows, h, n_tokens, y, j.n);
        for (int64_t k = 0; k < n_tokens; k++) {
            h[k] += std::popcount(rows[k]);
        }
    }
}

// h of each token, from its products; what is not zero moves to the front, and bits says where it was.
void activate_tokens(const pinfer_team * team, pinfer_rule rule, const float * gate, const float * up, float * h, uint64_t * bits,
                     int64_t n, int64_t n_tokens) {
    const int64_t n_words = (n + 63) / 64;
#pragma omp parallel for num_threads(team->n_threads) schedule(static) firstprivate(rule) // h might be it otherwise
    for (int64_t t = 0; t < n_tokens; t++) {
        float * const    out = h + t * n;
        uint64_t * const own = bits + t * n_words;
        for (int64_t i = 0; i < n; i++) {
            out[i] = pinfer_activate(rule, gate[t * n + i], up[t * n + i]);
        }
        pinfer_kernel_nonzero(n, out, own);
        float * end = out;
        for (int64_t word = 0; word < n_words; word++) {
            for (uint64_t left = own[word]; left; left &= left - 1) {
                *end++ = out[word * 64 + std::countr_zero(left)];
            }
        }
    }
}

void sum_down(pinfer_team * team, const sum_job & j, int64_t n_tokens, float * scratch) {
    // a few blocks for each thread
    const int64_t n_spans  = (j.n + PINFER_SUM_COLUMNS - 1) / PINFER_SUM_COLUMNS;
    const int64_t n_pieces = (4 * team->n_threads + n_spans - 1) / n_spans;
    const int64_t piece    = std::clamp<int64_t>((n_tokens + n_pieces - 1) / n_pieces, 1, SUM_TOKENS);
#pragma omp parallel for collapse(2) num_threads(team->n_threads) schedule(dynamic)
    for (int64_t t = 0; t < n_tokens; t += piece) {
        for (int64_t at = 0; at < j.n; at += PINFER_SUM_COLUMNS) {
            sum_block(j, at, std::min<int64_t>(PINFER_SUM_COLUMNS, j.n - at), t, std::min(piece, n_tokens - t),
                      scratch + (size_t) omp_get_thread_num() * (SUM_SCRATCH / sizeof(float)));
        }
    }
}

} // namespace

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
    const int64_t   n_words = (neurons.n + 63) / 64;
    const size_t    scratch = SUM_SCRATCH * (size_t) team->n_threads;
    uint8_t * const arena   = pinfer_team_arena(team, scratch + (size_t) (n_words * n_tokens) * sizeof(uint64_t));
    uint64_t * const bits   = (uint64_t *) (arena + scratch);
    activate_tokens(team, rule, gate, up, h, bits, neurons.n, n_tokens);
    sum_down(team, {neurons, h, bits, n_words, n_embd, y}, n_tokens, (float *) arena);
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
