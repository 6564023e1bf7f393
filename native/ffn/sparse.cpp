// sparse.cpp: the sparse executor. Candidates are named (predictor) or all (exact), 16 at a time their first product
// decides which fire, and only those are finished: the second product where there is one, then the sum of their down rows.
// Every thread takes an equal share of the candidates and sums its own; the sums meet in thread order, so one thread
// count gives one result.
#include "sparse.h"

#include <algorithm>
#include <numeric>
#include <omp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

namespace {

// Tokens computed together; more go slab by slab.
constexpr int64_t SLAB = 32;

// Neurons computed together: a tile.
constexpr int64_t GROUP = PINFER_TILE_ROWS;

// Neurons a thread takes at a time where all are computed: they are sorted by falling impact, so that the first ones fire
// far more often.
constexpr int64_t CHUNK = 16 * GROUP;

// Neurons that fire wait here until their other rows have arrived in the cache.
constexpr int64_t WAITING = 2 * GROUP;

struct x_view {
    const uint8_t * data = nullptr;
    size_t          row = 0; // bytes from token to token

    const uint8_t * token(int64_t t) const { return data + (size_t) t * row; }
};

// What all threads share.
struct shared {
    const pinfer_sparse_job &      job;
    const pinfer_rows &            first;  // decides whether a neuron fires
    const pinfer_rows *            second; // null: ungated
    const pinfer_rows *            down;   // null: absent
    const pinfer_predictor_layer * predictor;

    bool          from_disk; // rows may have to be read
    int64_t       n_tokens;  // of this slab
    const float * x;
    float *       h;

    // cut from the team's arena by lay_out
    x_view     x_first = {}, x_second = {}, x_predictor = {}, z = {};
    float *    hidden = nullptr;     // [n_tokens, rank]
    int32_t *  candidates = nullptr; // [n], the segment of thread i starts at its share of the neurons
    uint32_t * named = nullptr;      // bit t: token t named the candidate beside it
    int64_t *  n_found = nullptr;    // [threads]
    float *    partial = nullptr;    // [threads][n_tokens, n_embd]
    float *    scratch = nullptr;    // [threads][n_embd]
};

int64_t neuron_id(const shared & s, int64_t j) {
    return s.job.neurons->ids ? s.job.neurons->ids[j] : j;
}

const uint8_t * row_at(const pinfer_rows & rows, int64_t j) {
    return rows.data + (size_t) j * rows.stride;
}

// Scattered rows are too short for the hardware's prefetcher to get going, so every line is asked for. Into the second
// level: the first has too few outstanding misses (measured on Zen 4: 26 against 15 GB/s).
void prefetch_row(const pinfer_rows & rows, int64_t j, int64_t n) {
    const uintptr_t row = (uintptr_t) row_at(rows, j), end = row + ggml_row_size(rows.kernel->type, n);
    for (uintptr_t line = row / 64 * 64; line < end; line += 64) {
        __builtin_prefetch((const void *) line, 0, 2);
    }
}

// Asks the system for the pages of a row, to be read while others are computed.
void request_row(const pinfer_rows & rows, int64_t j, int64_t n) {
    static const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t        row   = (uintptr_t) row_at(rows, j), end = row + ggml_row_size(rows.kernel->type, n);
    const uintptr_t        begin = row / page * page;
    madvise((void *) begin, end - begin, MADV_WILLNEED);
}

// Whether this process has read from disk since the last call: then the shard is not in memory, or not yet.
bool reads_from_disk(pinfer_team * team) {
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    const bool reads = usage.ru_inblock != team->blocks_read;
    team->blocks_read   = usage.ru_inblock;
    return reads;
}

// Multiples of GROUP, so that tiles are whole.
int64_t share_begin(int64_t n, int ith, int nth) {
    const int64_t groups = (n + GROUP - 1) / GROUP;
    return std::min(n, groups * ith / nth * GROUP);
}

class worker {
public:
    worker(const shared & shared, uint8_t * tile, int ith, int nth) : s(shared), tile(tile), ith(ith), nth(nth) {
        const int64_t n = s.n_tokens * s.job.n_embd;
        y               = s.down ? s.partial + ith * n : nullptr;
        if (y) {
            std::fill(y, y + n, 0.0f);
            scratch = s.scratch + ith * s.job.n_embd;
        }
    }

    // The rows of A that are this thread's.
    void hidden() const {
        const pinfer_predictor_layer & p = *s.predictor;
        for (int64_t r = p.rank * ith / nth; r < p.rank * (ith + 1) / nth; r++) {
            float z[SLAB];
            pinfer_kernel_dot_many(p.a_kernel, s.job.n_embd, p.a + (size_t) r * p.a_row, s.x_predictor.data, s.x_predictor.row,
                                   s.n_tokens, z);
            for (int64_t t = 0; t < s.n_tokens; t++) {
                s.hidden[t * p.rank + r] = p.relu && z[t] < 0.0f ? 0.0f : z[t];
            }
        }
    }

    // The candidates among the neurons that are this thread's.
    void find_candidates() const {
        const int64_t begin = share_begin(s.job.neurons->n, ith, nth), end = share_begin(s.job.neurons->n, ith + 1, nth);
        int64_t       n     = 0;
        for (int64_t j = begin; j < end; j += GROUP) {
            float score[SLAB * GROUP];
            pinfer_predictor_scores(*s.predictor, s.job.neurons->ids, j, std::min(GROUP, end - j), s.z.data, s.z.row, s.n_tokens,
                                    score);
            const float * const threshold = s.predictor->thresholds.data() + j;
            uint32_t            above[SLAB], any = 0; // bit r: neuron j + r
            for (int64_t t = 0; t < s.n_tokens; t++) {
                above[t] = 0;
                for (int64_t r = 0; r < GROUP; r++) {
                    above[t] |= (uint32_t) (score[t * GROUP + r] > threshold[r]) << r;
                }
                any |= above[t];
            }
            for (; any; any &= any - 1) {
                const int r     = __builtin_ctz(any);
                uint32_t  named = 0;
                for (int64_t t = 0; t < s.n_tokens; t++) {
                    named |= (above[t] >> r & 1) << t;
                }
                s.candidates[begin + n] = (int32_t) (j + r);
                s.named[begin + n]      = named;
                n++;
            }
        }
        s.n_found[ith] = n;
    }

    void compute_candidates() {
        int64_t total = 0;
        for (int i = 0; i < nth; i++) {
            total += s.n_found[i];
        }
        const int64_t begin = share_begin(total, ith, nth), end = share_begin(total, ith + 1, nth);
        int64_t       before = 0; // candidates of the threads before i
        for (int i = 0; i < nth; i++) {
            const int64_t at   = share_begin(s.job.neurons->n, i, nth) - before;
            const int64_t from = std::max(begin, before), to = std::min(end, before + s.n_found[i]);
            if (from < to) {
                compute_list(s.candidates + at + from, s.named + at + from, to - from);
            }
            before += s.n_found[i];
        }
        finish(n_waiting);
    }

    // Rows of all neurons come in a stream, which the hardware fetches ahead by itself.
    void compute_all() {
        uint32_t every[GROUP];
        std::fill(every, every + GROUP, ~0u);
        for (int64_t chunk = ith * CHUNK; chunk < s.job.neurons->n; chunk += nth * CHUNK) {
            const int64_t end = std::min(s.job.neurons->n, chunk + CHUNK);
            for (int64_t j = chunk; j < end; j += GROUP) {
                int32_t list[GROUP];
                std::iota(list, list + GROUP, (int32_t) j);
                compute_group(list, every, std::min(GROUP, end - j), 0);
            }
        }
        finish(n_waiting);
    }

    pinfer_sparse_counts counts;

private:
    void compute_list(const int32_t * list, const uint32_t * named, int64_t n) {
        for (int64_t k = 0; s.from_disk && k < n; k++) {
            for (const pinfer_rows * rows : {&s.first, s.second, s.down}) {
                if (rows) {
                    request_row(*rows, list[k], s.job.n_embd);
                }
            }
        }
        for (int64_t at = 0; at < n; at += GROUP) {
            compute_group(list + at, named + at, std::min(GROUP, n - at), std::min(2 * GROUP, n - at));
        }
    }

    // out[t*GROUP + r] = rows[list[r]] . x_t, with bias, for the n <= GROUP rows of the list. The rows from list[GROUP] to
    // list[known - 1] come next: each is fetched while another is computed, since a burst of requests would stall both.
    void products(const pinfer_rows & rows, const x_view & x, const int32_t * list, int64_t n, int64_t known, float * out) const {
        if (rows.kernel->multiply && s.n_tokens > 1) {
            for (int64_t r = GROUP; r < known; r++) {
                prefetch_row(rows, list[r], s.job.n_embd);
            }
            const void * row[GROUP];
            for (int64_t r = 0; r < GROUP; r++) {
                row[r] = row_at(rows, list[std::min(r, n - 1)]);
            }
            rows.kernel->pack(0, s.job.n_embd, row, tile);
            std::fill(out, out + s.n_tokens * GROUP, 0.0f);
            rows.kernel->multiply(s.job.n_embd, 0, s.job.n_embd, tile, x.data, x.row, s.n_tokens, out, GROUP);
        } else {
            for (int64_t r = 0; r < n; r++) {
                if (r + GROUP < known) {
                    prefetch_row(rows, list[r + GROUP], s.job.n_embd);
                }
                float dots[SLAB];
                pinfer_kernel_dot_many(rows.kernel, s.job.n_embd, row_at(rows, list[r]), x.data, x.row, s.n_tokens, dots);
                for (int64_t t = 0; t < s.n_tokens; t++) {
                    out[t * GROUP + r] = dots[t];
                }
            }
        }
        for (int64_t r = 0; rows.bias && r < n; r++) {
            for (int64_t t = 0; t < s.n_tokens; t++) {
                out[t * GROUP + r] += rows.bias[list[r]];
            }
        }
    }

    void compute_group(const int32_t * list, const uint32_t * named, int64_t n, int64_t known) {
        const float threshold = s.job.rule.threshold;
        float       out[SLAB * GROUP];
        products(s.first, s.x_first, list, n, known, out);
        for (int64_t r = 0; r < n; r++) {
            counts.candidates += (uint64_t) std::min<int64_t>(__builtin_popcount(named[r]), s.n_tokens);
            float * f   = value[n_waiting];
            bool    any = false;
            for (int64_t t = 0; t < s.n_tokens; t++) {
                const bool fires = out[t * GROUP + r] > threshold && (named[r] >> t & 1);
                f[t]             = fires ? out[t * GROUP + r] : 0.0f;
                any |= fires;
            }
            if (any) {
                waiting[n_waiting++] = list[r];
                if (s.second) {
                    prefetch_row(*s.second, list[r], s.job.n_embd);
                }
                if (s.down) {
                    prefetch_row(*s.down, list[r], s.job.n_embd);
                }
                if (n_waiting == WAITING) {
                    finish(GROUP);
                }
            }
        }
    }

    // The first n neurons that wait: f_i(x) from the first product, then what they add to the output.
    void finish(int64_t n) {
        for (int64_t at = 0; at < n; at += GROUP) {
            finish_group(at, std::min(GROUP, n - at));
        }
        std::copy(waiting + n, waiting + n_waiting, waiting);
        std::copy(&value[n][0], &value[n_waiting][0], &value[0][0]);
        n_waiting -= n;
    }

    void finish_group(int64_t at, int64_t n) {
        float out[SLAB * GROUP], f[GROUP * SLAB];
        if (s.second) {
            products(*s.second, s.x_second, waiting + at, n, n, out);
        }
        const void * rows[GROUP];
        for (int64_t r = 0; r < n; r++) {
            const int32_t j = waiting[at + r];
            rows[r]         = s.down ? row_at(*s.down, j) : nullptr;
            for (int64_t t = 0; t < s.n_tokens; t++) {
                const float g  = value[at + r][t];
                const float fi = g > 0.0f ? pinfer_activate(s.job.rule, g, s.second ? out[t * GROUP + r] : g) : 0.0f;
                f[r * s.n_tokens + t] = fi;
                counts.active += fi != 0.0f;
                if (!s.down) {
                    s.h[t * s.job.n_ff + neuron_id(s, j)] = fi;
                }
            }
        }
        if (s.down) {
            pinfer_kernel_accumulate(s.down->kernel, s.job.n_embd, n, rows, f, s.n_tokens, y, scratch);
        }
    }

    const shared &     s;
    uint8_t *          tile;
    int                ith, nth;
    float *            y;
    float *            scratch = nullptr; // [n_embd]
    int64_t            n_waiting = 0;
    int32_t            waiting[WAITING];
    float              value[WAITING + 1][SLAB]; // first products, 0 where a token has no use for the neuron
};

// Every nth-th token of x into a kernel's input type.
void prepare(ggml_type type, const float * x, int64_t n, int64_t n_tokens, const x_view & out, int ith, int nth) {
    for (int64_t t = ith; t < n_tokens; t += nth) {
        pinfer_kernel_prepare(type, x + t * n, const_cast<uint8_t *>(out.token(t)), n);
    }
}

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

ggml_type predictor_x_type(const pinfer_predictor_layer & p) {
    return p.bits ? PINFER_X_Q8 : p.a_kernel->x_type;
}

// The buffers of a slab; returns their size.
size_t lay_out(shared * s, uint8_t ** tiles, uint8_t * base, int n_threads) {
    arena                          a(base);
    const pinfer_predictor_layer * p = s->predictor;
    const int64_t                  n = s->job.neurons->n, n_embd = s->job.n_embd;

    s->x_first     = a.take_x(s->first.kernel->x_type, n_embd, s->n_tokens);
    s->x_second    = s->x_first;
    s->x_predictor = s->x_first;
    if (s->second && s->second->kernel->x_type != s->first.kernel->x_type) {
        s->x_second = a.take_x(s->second->kernel->x_type, n_embd, s->n_tokens);
    }
    if (p) {
        if (predictor_x_type(*p) != s->first.kernel->x_type) {
            s->x_predictor = a.take_x(predictor_x_type(*p), n_embd, s->n_tokens);
        }
        s->z = s->x_predictor;
        if (!p->bits) {
            s->z      = a.take_x(p->b_kernel->x_type, p->rank, s->n_tokens);
            s->hidden = (float *) a.take((size_t) (s->n_tokens * p->rank) * sizeof(float));
        }
        s->candidates = (int32_t *) a.take((size_t) (n + 1) * sizeof(int32_t));
        s->named      = (uint32_t *) a.take((size_t) (n + 1) * sizeof(uint32_t));
        s->n_found    = (int64_t *) a.take((size_t) n_threads * sizeof(int64_t));
    }
    if (s->down) {
        s->partial = (float *) a.take((size_t) (n_threads * s->n_tokens * n_embd) * sizeof(float));
        s->scratch = (float *) a.take((size_t) (n_threads * n_embd) * sizeof(float));
    }
    *tiles = a.take((size_t) n_threads * pinfer_tile_size(n_embd));
    return a.used;
}

pinfer_sparse_counts compute_slab(pinfer_team * team, shared & s, float * y) {
    uint8_t *    tiles = nullptr;
    const size_t size  = lay_out(&s, &tiles, nullptr, team->n_threads);
    lay_out(&s, &tiles, pinfer_team_arena(team, size), team->n_threads);

    const pinfer_predictor_layer * p = s.predictor;
    uint64_t candidates = 0, active = 0;
#pragma omp parallel num_threads(team->n_threads) reduction(+ : candidates, active)
    {
        const int ith = omp_get_thread_num();
        const int nth = omp_get_num_threads();
        prepare(s.first.kernel->x_type, s.x, s.job.n_embd, s.n_tokens, s.x_first, ith, nth);
        if (s.x_second.data != s.x_first.data) {
            prepare(s.second->kernel->x_type, s.x, s.job.n_embd, s.n_tokens, s.x_second, ith, nth);
        }
        if (s.x_predictor.data != s.x_first.data) {
            prepare(predictor_x_type(*p), s.x, s.job.n_embd, s.n_tokens, s.x_predictor, ith, nth);
        }
        worker w(s, tiles + (size_t) ith * pinfer_tile_size(s.job.n_embd), ith, nth);
#pragma omp barrier
        if (p) {
            if (!p->bits) {
                w.hidden();
#pragma omp barrier
                prepare(p->b_kernel->x_type, s.hidden, p->rank, s.n_tokens, s.z, ith, nth);
#pragma omp barrier
            }
            w.find_candidates();
#pragma omp barrier
            w.compute_candidates();
        } else {
            w.compute_all();
        }
        candidates += w.counts.candidates;
        active += w.counts.active;
        if (s.down) {
#pragma omp barrier
            const int64_t n = s.n_tokens * s.job.n_embd;
            for (int64_t k = n * ith / nth; k < n * (ith + 1) / nth; k++) {
                float sum = 0.0f;
                for (int i = 0; i < nth; i++) {
                    sum += s.partial[i * n + k];
                }
                y[k] = sum;
            }
        }
    }
    return {.candidates = candidates, .active = active};
}

} // namespace

pinfer_sparse_counts pinfer_sparse_compute(pinfer_team * team, const pinfer_sparse_job & job) {
    const pinfer_neurons & neurons = *job.neurons;
    pinfer_sparse_counts   sum;
    for (int64_t t = 0; t < job.n_tokens; t += SLAB) {
        shared s = {
            .job       = job,
            .first     = job.gated ? neurons.gate : neurons.up,
            .second    = job.gated ? &neurons.up : nullptr,
            .down      = neurons.down.data ? &neurons.down : nullptr,
            .predictor = job.predictor,
            .from_disk = job.predictor && reads_from_disk(team),
            .n_tokens  = std::min(SLAB, job.n_tokens - t),
            .x         = job.x + t * job.n_embd,
            .h         = job.h ? job.h + t * job.n_ff : nullptr,
        };
        const pinfer_sparse_counts c = compute_slab(team, s, job.y ? job.y + t * job.n_embd : nullptr);
        sum.candidates += c.candidates;
        sum.active += c.active;
    }
    return sum;
}
