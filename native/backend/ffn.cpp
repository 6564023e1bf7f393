// ffn.cpp: the sparse FFN. Candidates are named (predictor) or all (exact); the first product decides which fire; only
// those are finished. Each thread sums its own neurons, the sums meet in thread order: one thread count, one result.
#include "ffn.h"

#include "kernels.h"

#include <cstring>
#include <omp.h>

// Neurons a thread takes at a time; chunks go round, since the cold shard is sorted by falling impact.
static const int64_t CHUNK = 64;
// Neurons whose bundle is asked for ahead of the one being computed.
static const int64_t AHEAD = 2;

namespace {

struct job {
    const pinfer_neurons *         neurons;
    const int32_t *                walk;   // order in which neurons are visited, null: as they lie
    const pinfer_rows *            first;  // decides whether a neuron fires: gate, or up where there is no gate
    bool                           first_of_model; // first holds every row of the model, found by the neuron's id
    const pinfer_rows *            second; // null: ungated
    const pinfer_predictor_layer * predictor; // null: every neuron is a candidate
    pinfer_activation              act;
    int64_t                        n_embd, n_tokens, n_ff;
    const float *                  x; // [n_tokens, n_embd]
    float *                        h; // [n_tokens, n_ff], only where there are no down rows

    const uint8_t * x_first;
    const uint8_t * x_second;
    const uint8_t * x_pred;
    const uint8_t * z; // hidden of the predictor, prepared
    size_t          x_first_row, x_second_row, x_pred_row, z_row;
};

struct counts {
    uint64_t candidates = 0, active = 0;
};

int64_t neuron_id(const job & j, int64_t i) {
    return j.neurons->ids ? j.neurons->ids[i] : i;
}

// Neuron at place k of the walk.
int64_t visited(const job & j, int64_t k) {
    return j.walk ? j.walk[k] : k;
}

int64_t first_row(const job & j, int64_t i) {
    return j.first_of_model ? neuron_id(j, i) : i;
}

float dot(const pinfer_rows & rows, int64_t i, int64_t n, const uint8_t * x) {
    const float d = pinfer_kernel_dot(rows.kernel, n, rows.data + (size_t) i * rows.stride, x);
    return rows.bias ? d + rows.bias[i] : d;
}

bool is_candidate(const job & j, int64_t i, int64_t t) {
    const int64_t id    = neuron_id(j, i);
    const float   score = pinfer_kernel_dot(j.predictor->b_kernel, j.predictor->rank,
                                            j.predictor->b + (size_t) id * j.predictor->b_row, j.z + (size_t) t * j.z_row);
    return score > j.predictor->t[id];
}

// f_i(x_t); 0 when the neuron does not fire.
float fire(const job & j, int64_t i, int64_t t) {
    const float g = dot(*j.first, first_row(j, i), j.n_embd, j.x_first + (size_t) t * j.x_first_row);
    if (!(g > 0.0f)) {
        return 0.0f;
    }
    if (!j.second) {
        return j.act == PINFER_ACT_RELU2 ? g * g : g;
    }
    const float u = dot(*j.second, i, j.n_embd, j.x_second + (size_t) t * j.x_second_row);
    return j.act == PINFER_ACT_DRELU && !(u > 0.0f) ? 0.0f : g * u;
}

void prefetch_row(const pinfer_rows & rows, int64_t i, int64_t n) {
    const uint8_t * row  = rows.data + (size_t) i * rows.stride;
    const size_t    size = ggml_row_size(rows.kernel->type, n);
    for (size_t at = 0; at < size; at += 64) {
        __builtin_prefetch(row + at, 0, 2);
    }
}

// Scattered rows are too short for the hardware prefetcher to get going, so every line is asked for. Behind a predictor
// most candidates fire, and the rest of the bundle will be wanted; in exact mode nine of ten will not.
void prefetch(const job & j, int64_t i) {
    prefetch_row(*j.first, first_row(j, i), j.n_embd);
    if (!j.predictor) {
        return;
    }
    if (j.second) {
        prefetch_row(*j.second, i, j.n_embd);
    }
    if (j.neurons->down.data) {
        prefetch_row(j.neurons->down, i, j.n_embd);
    }
}

// Places [begin, end) of the walk for every token; y [n_tokens, n_embd] takes the sums. `named` holds CHUNK flags per token.
counts compute_chunk(const job & j, int64_t begin, int64_t end, float * y, float * scratch, uint8_t * named) {
    counts        c;
    int64_t       list[CHUNK];
    int64_t       n_list = 0;
    const int64_t n_tok  = j.n_tokens;
    for (int64_t k = begin; k < end; k++) {
        const int64_t i   = visited(j, k);
        bool          any = !j.predictor;
        for (int64_t t = 0; j.predictor && t < n_tok; t++) {
            const bool yes              = is_candidate(j, i, t);
            named[n_list * n_tok + t] = yes;
            any |= yes;
        }
        if (any) {
            list[n_list++] = i;
        }
    }
    for (int64_t k = 0; k < n_list; k++) {
        if (k + AHEAD < n_list) {
            prefetch(j, list[k + AHEAD]);
        }
        const int64_t i = list[k];
        for (int64_t t = 0; t < n_tok; t++) {
            if (j.predictor && !named[k * n_tok + t]) {
                continue;
            }
            c.candidates++;
            const float f = fire(j, i, t);
            if (f == 0.0f) {
                continue;
            }
            c.active++;
            if (j.neurons->down.data) {
                pinfer_kernel_axpy(j.neurons->down.kernel, j.n_embd, f,
                                   j.neurons->down.data + (size_t) i * j.neurons->down.stride, y + t * j.n_embd, scratch);
            } else {
                j.h[t * j.n_ff + neuron_id(j, i)] = f;
            }
        }
    }
    return c;
}

// Every t-th token of x into a kernel's input type.
void prepare(ggml_type type, const float * x, int64_t n, int64_t n_tokens, uint8_t * out, size_t row, int ith, int nth) {
    for (int64_t t = ith; t < n_tokens; t += nth) {
        pinfer_kernel_prepare(type, x + t * n, out + (size_t) t * row, n);
    }
}

size_t aligned(size_t n) {
    return (n + 63) / 64 * 64;
}

// Reserves room for n_tokens prepared rows in `arena` at *used.
size_t reserve(size_t * used, size_t row, int64_t n_tokens) {
    const size_t at = *used;
    *used += row * (size_t) n_tokens;
    return at;
}

// Runs the job; partial[thread] holds the thread's sums when neurons have down rows.
counts run(pinfer_engine * e, job & j) {
    const pinfer_predictor_layer * p = j.predictor;

    size_t used = 0;
    j.x_first_row  = aligned(pinfer_kernel_prepared_size(j.first->kernel->x_type, j.n_embd));
    j.x_second_row = j.second ? aligned(pinfer_kernel_prepared_size(j.second->kernel->x_type, j.n_embd)) : 0;
    j.x_pred_row   = p ? aligned(pinfer_kernel_prepared_size(p->a_kernel->x_type, j.n_embd)) : 0;
    j.z_row        = p ? aligned(pinfer_kernel_prepared_size(p->b_kernel->x_type, p->rank)) : 0;
    const bool   shared_x  = j.second && j.second->kernel->x_type == j.first->kernel->x_type;
    const size_t at_first  = reserve(&used, j.x_first_row, j.n_tokens);
    const size_t at_second = shared_x ? at_first : reserve(&used, j.x_second_row, j.n_tokens);
    const size_t at_pred   = reserve(&used, j.x_pred_row, j.n_tokens);
    const size_t at_z      = reserve(&used, j.z_row, j.n_tokens);
    if (e->prepared.size() < used + 64) {
        e->prepared.resize(used + 64);
    }
    uint8_t * const arena = (uint8_t *) aligned((size_t) e->prepared.data());
    j.x_first  = arena + at_first;
    j.x_second = arena + at_second;
    j.x_pred   = arena + at_pred;
    j.z        = arena + at_z;
    if (p) {
        e->hidden.resize((size_t) (p->rank * j.n_tokens));
    }
    const size_t sums = (size_t) (j.n_tokens * j.n_embd);
    if (j.neurons->down.data && e->partial.size() < sums * (size_t) e->n_threads) {
        e->partial.resize(sums * (size_t) e->n_threads);
    }

    uint64_t candidates = 0, active = 0;
#pragma omp parallel num_threads(e->n_threads) reduction(+ : candidates, active)
    {
        const int ith = omp_get_thread_num();
        const int nth = omp_get_num_threads();
        prepare(j.first->kernel->x_type, j.x, j.n_embd, j.n_tokens, arena + at_first, j.x_first_row, ith, nth);
        if (j.second && !shared_x) {
            prepare(j.second->kernel->x_type, j.x, j.n_embd, j.n_tokens, arena + at_second, j.x_second_row, ith, nth);
        }
        if (p) {
            prepare(p->a_kernel->x_type, j.x, j.n_embd, j.n_tokens, arena + at_pred, j.x_pred_row, ith, nth);
        }
        float * const y = j.neurons->down.data ? e->partial.data() + sums * (size_t) ith : nullptr;
        if (y) {
            memset(y, 0, sums * sizeof(float));
        }
#pragma omp barrier
        if (p) {
            for (int64_t r = ith; r < p->rank; r += nth) {
                for (int64_t t = 0; t < j.n_tokens; t++) {
                    const float z = pinfer_kernel_dot(p->a_kernel, j.n_embd, p->a + (size_t) r * p->a_row,
                                                      j.x_pred + (size_t) t * j.x_pred_row);
                    e->hidden[(size_t) (t * p->rank + r)] = p->relu && z < 0.0f ? 0.0f : z;
                }
            }
#pragma omp barrier
            prepare(p->b_kernel->x_type, e->hidden.data(), p->rank, j.n_tokens, arena + at_z, j.z_row, ith, nth);
#pragma omp barrier
        }
        std::vector<float>   scratch((size_t) j.n_embd);
        std::vector<uint8_t> named(p ? (size_t) (CHUNK * j.n_tokens) : 0);
        for (int64_t begin = ith * CHUNK; begin < j.neurons->n; begin += nth * CHUNK) {
            const int64_t end = begin + CHUNK < j.neurons->n ? begin + CHUNK : j.neurons->n;
            const counts  c   = compute_chunk(j, begin, end, y, scratch.data(), named.data());
            candidates += c.candidates;
            active += c.active;
        }
    }
    return {.candidates = candidates, .active = active};
}

// The model's own matrices as neurons: rows of gate and up lie whole, down lies across and is absent.
pinfer_rows model_rows(const pinfer_product & p) {
    if (!p.mul_mat) {
        return {};
    }
    return {
        .data   = (const uint8_t *) p.weight->data,
        .stride = p.weight->nb[1],
        .kernel = pinfer_kernel_get(p.weight->type),
        .bias   = p.bias ? (const float *) p.bias->data : nullptr,
    };
}

// dst = partial sums in thread order, then the hot part, then the bias.
void gather(pinfer_engine * e, const pinfer_ffn & f, int64_t n_parts, const float * hot) {
    const int64_t n_embd = f.down.out()->ne[0];
    const int64_t n      = ggml_nelements(f.down.out());
    const float * bias   = f.down.bias ? (const float *) f.down.bias->data : nullptr;
    float *       dst    = (float *) f.down.out()->data;
    const float * parts  = e->partial.data();
#pragma omp parallel for num_threads(e->n_threads) schedule(static)
    for (int64_t k = 0; k < n; k++) {
        float sum = 0.0f;
        for (int64_t i = 0; i < n_parts; i++) {
            sum += parts[i * n + k];
        }
        sum += hot ? hot[k] : 0.0f;
        dst[k] = sum + (bias ? bias[k % n_embd] : 0.0f);
    }
}

// Neurons lie in shards: cold ones here, hot ones on their device at the same time.
ggml_status compute_shards(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, job & j) {
    const pinfer_hot_layer * hot = s->hot ? &s->hot->layers[(size_t) f.layer] : nullptr;
    const bool               any = hot && hot->n > 0;
    if (any && !pinfer_hot_begin(s->hot.get(), f.layer, j.act, j.x, j.n_tokens)) {
        return GGML_STATUS_FAILED;
    }
    counts c;
    if (j.neurons->n > 0) {
        c = run(e, j);
    }
    if (any) {
        e->hot_y.resize((size_t) (j.n_tokens * j.n_embd));
        if (!pinfer_hot_end(s->hot.get(), e->hot_y.data(), j.n_tokens)) {
            return GGML_STATUS_FAILED;
        }
        s->stats.n_hot += (uint64_t) (hot->n * j.n_tokens);
    }
    s->stats.n_candidates += c.candidates;
    s->stats.n_active += c.active;
    gather(e, f, j.neurons->n > 0 ? e->n_threads : 0, any ? e->hot_y.data() : nullptr);
    return GGML_STATUS_SUCCESS;
}

// No shards: down is multiplied whole, from an h that is zero where nothing fired.
ggml_status compute_model(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f, job & j) {
    memset(j.h, 0, ggml_nbytes(f.h));
    const counts c = run(e, j);
    s->stats.n_candidates += c.candidates;
    s->stats.n_active += c.active;
    ggml_tensor * last[] = {f.down.mul_mat, f.down.add};
    return pinfer_dense_nodes(e, last, 2);
}

} // namespace

ggml_status pinfer_ffn_compute(pinfer_engine * e, pinfer_state * s, const pinfer_ffn & f) {
    const pinfer_activation act = s->activation == PINFER_ACT_GRAPH ? f.graph_act : s->activation;
    const auto              il  = (size_t) f.layer;

    const pinfer_neurons *         cold = s->cold && il < s->cold->layers.size() ? &s->cold->layers[il] : nullptr;
    const pinfer_predictor_layer * pred = s->predictor && il < s->predictor->layers.size() ? &s->predictor->layers[il] : nullptr;
    if (pred && pred->rank == 0) {
        pred = nullptr;
    }
    const int64_t n_tokens = f.x->ne[1];
    // Without shards only an up row or a predictor can be saved; else the products of llama.cpp are as good and faster.
    const bool pays = cold || f.gated() || pred;
    if (s->observer.on || n_tokens >= s->n_batch_dense || !pays) {
        return pinfer_dense_ffn(e, s, f, act);
    }

    pinfer_neurons own;
    if (!cold) {
        own.n    = f.up.weight->ne[1];
        own.gate = model_rows(f.gate);
        own.up   = model_rows(f.up);
        if (!own.up.kernel || (f.gated() && !own.gate.kernel)) {
            return pinfer_dense_ffn(e, s, f, act);
        }
    }
    const pinfer_neurons * neurons = cold ? cold : &own;

    job j       = {};
    j.neurons   = neurons;
    j.first     = f.gated() ? &neurons->gate : &neurons->up;
    // Exact mode reads the first row of every neuron: from the model, where these rows lie side by side, it streams.
    const pinfer_rows whole = model_rows(f.gated() ? f.gate : f.up);
    if (cold && !pred && whole.kernel) {
        j.walk           = neurons->by_id.data();
        j.first          = &whole;
        j.first_of_model = true;
    }
    j.second    = f.gated() ? &neurons->up : nullptr;
    j.predictor = pred;
    j.act       = act;
    j.n_embd    = f.x->ne[0];
    j.n_tokens  = n_tokens;
    j.n_ff      = f.h->ne[0];
    j.x         = (const float *) f.x->data;
    j.h         = (float *) f.h->data;

    s->stats.n_tokens += (uint64_t) n_tokens;
    s->stats.n_neurons += (uint64_t) (n_tokens * j.n_ff);
    return cold ? compute_shards(e, s, f, j) : compute_model(e, s, f, j);
}
