// sparse.cpp: the sparse executor. Candidates are named (predictor) or all (exact), 16 at a time their first product
// decides which fire, and only those are finished: the second product where there is one, then the sum of their down rows.
// Every thread takes an equal share of the candidates and sums its own; the sums meet in thread order, so one thread
// count gives one result.
#include "sparse.h"

#include "shares.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <omp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

namespace {

// Tokens that a neuron is computed for at a time.
constexpr int64_t SLAB = 32;

// Neurons computed together: a tile.
constexpr int64_t GROUP = PINFER_TILE_ROWS;

// Neurons a thread takes at a time where all are computed, at most: they are sorted by falling impact, so that the first ones
// fire far more often.
constexpr int64_t CHUNK = 16 * GROUP;

// What unpacking a row costs, in products with it.
constexpr int64_t UNPACKING = 4;

// Bytes of the sums of all threads.
constexpr int64_t SUMS = 64 << 20;

// Neurons that fire wait here until their other rows have arrived in the cache.
constexpr int64_t WAITING = 2 * GROUP;

struct x_view {
    const uint8_t * data = nullptr;
    size_t          row = 0; // bytes from token to token

    const uint8_t * token(int64_t t) const { return data + (size_t) t * row; }
};

// Neurons in a row that the same tokens need: all of an FFN, or those of an expert and some of the tokens routed to it.
struct segment {
    int64_t         n = 0;
    int64_t         row = 0;   // of its first neuron in gate, up and the predictor
    int64_t         down = 0;  // in down
    int64_t         place = 0; // of its candidates among all
    int64_t         n_tokens = 0;
    const int32_t * tokens = nullptr;  // of the batch; null: all
    const float *   weights = nullptr; // of the expert, for these tokens; null: 1
};

// What all threads share.
struct shared {
    const pinfer_sparse_job &    job;
    const pinfer_rows &          first;  // decides whether a neuron fires
    const pinfer_rows *          second; // null: ungated
    const pinfer_rows *          down;   // null: absent
    const pinfer_predictor_ffn * predictor;

    bool          from_disk; // rows may have to be read
    int64_t       n_tokens;
    const float * x;
    float *       h;

    std::vector<segment>      segments = {};
    std::vector<pinfer_share> shares = {}; // exact mode
    int64_t                   n_neurons = 0; // of all segments
    bool                      gathers = false; // segments are of some tokens only

    // cut from the team's arena by lay_out
    x_view     x_first = {}, x_second = {}, x_predictor = {}, z = {};
    float *    hidden = nullptr;     // [n_tokens, rank]
    int32_t *  candidates = nullptr; // [n_neurons], those of a segment and thread start at its share of the neurons
    uint32_t * named = nullptr;      // bit t: token t of the segment named the candidate beside it
    int64_t *  n_found = nullptr;    // [segments][threads]
    float *    partial = nullptr;    // [threads][n_tokens, n_embd]
    uint8_t *  own = nullptr;        // [threads] of own_size: memory of one worker
    size_t     own_size = 0;
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

// Multiples of `step`: of GROUP, where tiles have to be whole.
int64_t share_begin(int64_t n, int ith, int nth, int64_t step = GROUP) {
    const int64_t steps = (n + step - 1) / step;
    return std::min(n, steps * ith / nth * step);
}

// The matrices of a segment, and x of its tokens.
struct rows_view {
    pinfer_rows rows;
    x_view      x;

    const uint8_t * row(int64_t j) const { return row_at(rows, j); }
};

pinfer_rows from_row(pinfer_rows rows, int64_t first) {
    rows.data += (size_t) first * rows.stride;
    rows.bias = rows.bias ? rows.bias + first : nullptr;
    return rows;
}

size_t scratch_size(int64_t n_embd) {
    return ((size_t) n_embd * sizeof(float) + 63) / 64 * 64;
}

class worker {
public:
    worker(const shared & shared, int ith, int nth) : s(shared), ith(ith), nth(nth) {
        uint8_t * own = s.own + (size_t) ith * s.own_size;
        tile          = own;
        own += pinfer_tile_size(s.job.n_embd);
        if (s.down) {
            const int64_t n = s.n_tokens * s.job.n_embd;
            total           = s.partial + ith * n;
            std::fill(total, total + n, 0.0f);
            scratch = (float *) own;
            own += scratch_size(s.job.n_embd);
        }
        gathered = own;
    }

    // The rows of A that are this thread's.
    void hidden() const {
        const int64_t rank = s.predictor->rank;
        pinfer_predictor_hidden(*s.predictor, share_begin(rank, ith, nth), share_begin(rank, ith + 1, nth), s.x_predictor.data,
                                s.x_predictor.row, s.n_tokens, s.hidden);
    }

    // The candidates among the neurons that are this thread's, of every segment.
    void find_candidates() {
        for (size_t i = 0; i < s.segments.size(); i++) {
            find_in(i);
        }
    }

    void compute_candidates() {
        for (size_t i = 0; i < s.segments.size(); i++) {
            const int64_t * const found = s.n_found + (int64_t) i * nth;
            const int64_t         sum   = std::accumulate(found, found + nth, (int64_t) 0);
            const int64_t         step  = s.segments[i].n_tokens > 1 ? GROUP : 1; // whole tiles, or single rows
            const int64_t         begin = share_begin(sum, ith, nth, step), end = share_begin(sum, ith + 1, nth, step);
            int64_t               before = 0; // candidates of the threads before j
            enter(s.segments[i]);
            for (int j = 0; j < nth; j++) {
                const int64_t at   = at_segment->place + share_begin(at_segment->n, j, nth) - before;
                const int64_t from = std::max(begin, before), to = std::min(end, before + found[j]);
                if (from < to) {
                    compute_list(s.candidates + at + from, s.named + at + from, to - from);
                }
                before += found[j];
            }
            leave();
        }
    }

    // Rows of all neurons come in a stream. The hardware does not fetch it ahead far enough: 4-bit rows arrive at 8 GB/s then.
    void compute_all() {
        uint32_t every[GROUP];
        std::fill(every, every + GROUP, ~0u);
        for (const pinfer_share & share : s.shares) {
            if (share.thread % nth != ith) {
                continue;
            }
            if (at_segment != &s.segments[(size_t) share.work]) {
                leave();
                enter(s.segments[(size_t) share.work]);
            }
            for (int64_t j = share.begin; j < share.end; j += GROUP) {
                int32_t list[2 * GROUP];
                std::iota(list, list + 2 * GROUP, (int32_t) j);
                compute_group(list, every, std::min(GROUP, share.end - j), std::min(2 * GROUP, share.end - j));
            }
        }
        leave();
    }

    pinfer_sparse_counts counts;

private:
    void enter(const segment & g) {
        at_segment = &g;
        n_tokens   = g.n_tokens;
        mask       = n_tokens >= 32 ? ~0u : (1u << n_tokens) - 1;
        first      = {from_row(s.first, g.row), s.x_first};
        if (s.second) {
            second = {from_row(*s.second, g.row), s.x_second};
        }
        if (s.down) {
            down = from_row(*s.down, g.down);
        }
        z = s.z;
        y = total;
        if (s.gathers) {
            uint8_t * to = gathered;
            first.x      = gathered_of(g, s.x_first, &to);
            if (s.second) {
                second.x = s.x_second.data == s.x_first.data ? first.x : gathered_of(g, s.x_second, &to);
            }
            if (s.predictor) {
                z = s.z.data == s.x_first.data ? first.x : gathered_of(g, s.z, &to);
            }
            y = (float *) to;
            std::fill(y, y + n_tokens * s.job.n_embd, 0.0f);
        }
    }

    // The rows of the segment's tokens, one after another at *to, which moves past them.
    static x_view gathered_of(const segment & g, x_view x, uint8_t ** to) {
        for (int64_t t = 0; t < g.n_tokens; t++) {
            memcpy(*to + (size_t) t * x.row, x.token(g.tokens[t]), x.row);
        }
        x.data = *to;
        *to += (size_t) SLAB * x.row;
        return x;
    }

    void leave() {
        if (!at_segment) {
            return;
        }
        finish(n_waiting);
        for (int64_t t = 0; s.gathers && t < n_tokens; t++) {
            const float * const from = y + t * s.job.n_embd;
            float * const       to   = total + at_segment->tokens[t] * s.job.n_embd;
            for (int64_t k = 0; k < s.job.n_embd; k++) {
                to[k] += from[k];
            }
        }
        at_segment = nullptr;
    }

    void find_in(size_t i) {
        const segment & g     = s.segments[i];
        const int64_t   begin = share_begin(g.n, ith, nth), end = share_begin(g.n, ith + 1, nth);
        int64_t         n     = 0;
        if (s.gathers) {
            enter(g);
        } else {
            z        = s.z;
            n_tokens = g.n_tokens;
        }
        const int32_t * const ids = s.job.routes ? nullptr : s.job.neurons->ids; // of a stack they name experts
        for (int64_t j = begin; j < end; j += GROUP) {
            float score[SLAB * GROUP];
            pinfer_predictor_scores(*s.predictor, ids, g.row + j, std::min(GROUP, end - j), z.data, z.row, n_tokens,
                                    score);
            const float * const threshold = s.predictor->thresholds.data() + g.row + j;
            uint32_t            above[SLAB], any = 0; // bit r: neuron j + r
            for (int64_t t = 0; t < n_tokens; t++) {
                above[t] = 0;
                for (int64_t r = 0; r < GROUP; r++) {
                    above[t] |= (uint32_t) (score[t * GROUP + r] > threshold[r]) << r;
                }
                any |= above[t];
            }
            for (; any; any &= any - 1) {
                const int r     = __builtin_ctz(any);
                uint32_t  named = 0;
                for (int64_t t = 0; t < n_tokens; t++) {
                    named |= (above[t] >> r & 1) << t;
                }
                s.candidates[g.place + begin + n] = (int32_t) (j + r);
                s.named[g.place + begin + n]      = named;
                n++;
            }
        }
        s.n_found[(int64_t) i * nth + ith] = n;
        at_segment                         = nullptr;
    }

    void compute_list(const int32_t * list, const uint32_t * named, int64_t n) {
        for (int64_t k = 0; s.from_disk && k < n; k++) {
            request_row(first.rows, list[k], s.job.n_embd);
            if (s.second) {
                request_row(second.rows, list[k], s.job.n_embd);
            }
            if (s.down) {
                request_row(down, list[k], s.job.n_embd);
            }
        }
        for (int64_t at = 0; at < n; at += GROUP) {
            compute_group(list + at, named + at, std::min(GROUP, n - at), std::min(2 * GROUP, n - at));
        }
    }

    // out[t*GROUP + r] = rows[list[r]] . x_t, with bias, for the n <= GROUP rows of the list. The rows from list[GROUP] to
    // list[known - 1] come next: each is fetched while another is computed, since a burst of requests would stall both.
    void products(const rows_view & v, const int32_t * list, int64_t n, int64_t known, float * out) const {
        const pinfer_rows & rows = v.rows;
        if (rows.kernel->multiply && n_tokens > 1) {
            for (int64_t r = GROUP; r < known; r++) {
                prefetch_row(rows, list[r], s.job.n_embd);
            }
            const void * row[GROUP];
            for (int64_t r = 0; r < GROUP; r++) {
                row[r] = v.row(list[std::min(r, n - 1)]);
            }
            rows.kernel->pack(0, s.job.n_embd, row, tile);
            std::fill(out, out + n_tokens * GROUP, 0.0f);
            rows.kernel->multiply(s.job.n_embd, 0, s.job.n_embd, tile, v.x.data, v.x.row, n_tokens, out, GROUP);
        } else {
            for (int64_t r = 0; r < n; r++) {
                if (r + GROUP < known) {
                    prefetch_row(rows, list[r + GROUP], s.job.n_embd);
                }
                float dots[SLAB];
                pinfer_kernel_dot_many(rows.kernel, s.job.n_embd, v.row(list[r]), v.x.data, v.x.row, n_tokens, dots);
                for (int64_t t = 0; t < n_tokens; t++) {
                    out[t * GROUP + r] = dots[t];
                }
            }
        }
        for (int64_t r = 0; rows.bias && r < n; r++) {
            for (int64_t t = 0; t < n_tokens; t++) {
                out[t * GROUP + r] += rows.bias[list[r]];
            }
        }
    }

    void compute_group(const int32_t * list, const uint32_t * named, int64_t n, int64_t known) {
        const float threshold = s.job.rule.threshold;
        float       out[SLAB * GROUP];
        products(first, list, n, known, out);
        for (int64_t r = 0; r < n; r++) {
            counts.candidates += (uint64_t) __builtin_popcount(named[r] & mask);
            float * f   = value[n_waiting];
            bool    any = false;
            for (int64_t t = 0; t < n_tokens; t++) {
                const bool fires = out[t * GROUP + r] > threshold && (named[r] >> t & 1);
                f[t]             = fires ? out[t * GROUP + r] : 0.0f;
                any |= fires;
            }
            if (any) {
                waiting[n_waiting++] = list[r];
                if (s.second) {
                    prefetch_row(second.rows, list[r], s.job.n_embd);
                }
                if (s.down) {
                    prefetch_row(down, list[r], s.job.n_embd);
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
        const float * const weights = at_segment->weights;
        float               out[SLAB * GROUP], f[GROUP * SLAB];
        if (s.second) {
            products(second, waiting + at, n, n, out);
        }
        const void * rows[GROUP];
        for (int64_t r = 0; r < n; r++) {
            const int32_t j = waiting[at + r];
            rows[r]         = s.down ? row_at(down, j) : nullptr;
            for (int64_t t = 0; t < n_tokens; t++) {
                const float g  = value[at + r][t];
                const float fi = g > 0.0f ? pinfer_activate(s.job.rule, g, s.second ? out[t * GROUP + r] : g) : 0.0f;
                f[r * n_tokens + t] = weights ? fi * weights[t] : fi;
                counts.active += fi != 0.0f;
                if (!s.down) {
                    s.h[t * s.job.n_ff + neuron_id(s, j)] = fi;
                }
            }
        }
        if (s.down) {
            pinfer_kernel_accumulate(down.kernel, s.job.n_embd, n, rows, f, n_tokens, y, scratch);
        }
    }

    const shared &  s;
    int             ith, nth;
    uint8_t *       tile = nullptr;
    float *         total = nullptr;    // [n_tokens of the batch, n_embd]: what this thread adds to the output
    float *         scratch = nullptr;  // [n_embd]
    uint8_t *       gathered = nullptr; // x and y of a segment's tokens
    // of the segment
    const segment * at_segment = nullptr;
    int64_t         n_tokens = 0;
    uint32_t        mask = 0; // a bit for each token
    rows_view       first, second;
    pinfer_rows     down;
    x_view          z;
    float *         y = nullptr; // [n_tokens, n_embd]
    int64_t         n_waiting = 0;
    int32_t         waiting[WAITING];
    float           value[WAITING + 1][SLAB]; // first products, 0 where a token has no use for the neuron
};

// The tokens and weights of every expert, and the segments they make.
struct routing {
    std::vector<int32_t> tokens;
    std::vector<float>   weights;
};

// Sorts the tokens [from, from + n_tokens) by the experts they are routed to: counting, then placing.
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

ggml_type predictor_x_type(const pinfer_predictor_ffn & p) {
    return p.bits ? PINFER_X_Q8 : p.a_kernel->x_type;
}

// The buffers of a batch; returns their size.
size_t lay_out(shared * s, uint8_t * base, int n_threads) {
    arena                        a(base);
    const pinfer_predictor_ffn * p = s->predictor;
    const int64_t                n_embd = s->job.n_embd;

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

pinfer_sparse_counts compute_segments(pinfer_team * team, shared & s, float * y) {
    if (!s.predictor) {
        std::vector<pinfer_work> work;
        for (const segment & g : s.segments) {
            work.push_back({g.n, UNPACKING + g.n_tokens});
        }
        s.shares = pinfer_share_out(work, GROUP, CHUNK, team->n_threads);
    }
    const size_t size = lay_out(&s, nullptr, team->n_threads);
    lay_out(&s, pinfer_team_arena(team, size), team->n_threads);

    const pinfer_predictor_ffn * p = s.predictor;
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
        worker w(s, ith, nth);
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

// Tokens computed together: those of a stack are sorted by their experts first, so the more there are the better, as far as
// the sums of all threads stay small.
int64_t batch_of(const pinfer_team * team, const pinfer_sparse_job & job) {
    const int64_t most = SUMS / (team->n_threads * job.n_embd * (int64_t) sizeof(float));
    return job.routes ? std::max(SLAB, most) : SLAB;
}

} // namespace

pinfer_sparse_counts pinfer_sparse_compute(pinfer_team * team, const pinfer_sparse_job & job) {
    const pinfer_neurons & neurons = *job.neurons;
    const int64_t          batch   = batch_of(team, job);
    pinfer_sparse_counts   sum;
    for (int64_t t = 0; t < job.n_tokens; t += batch) {
        shared s = {
            .job       = job,
            .first     = job.gated ? neurons.gate : neurons.up,
            .second    = job.gated ? &neurons.up : nullptr,
            .down      = neurons.down.data ? &neurons.down : nullptr,
            .predictor = job.predictor,
            .from_disk = job.predictor && reads_from_disk(team),
            .n_tokens  = std::min(batch, job.n_tokens - t),
            .x         = job.x + t * job.n_embd,
            .h         = job.h ? job.h + t * job.n_ff : nullptr,
        };
        routing routed;
        if (job.routes) {
            route(&s, *job.routes, neurons.place, t, &routed);
        } else {
            s.segments  = {{.n = neurons.n, .n_tokens = s.n_tokens}};
            s.n_neurons = neurons.n;
        }
        const pinfer_sparse_counts c = compute_segments(team, s, job.y ? job.y + t * job.n_embd : nullptr);
        sum.candidates += c.candidates;
        sum.active += c.active;
    }
    return sum;
}

void pinfer_sparse_down(pinfer_team * team, const pinfer_neurons & neurons, const float * h, int64_t n_ff, int64_t n_embd,
                        int64_t n_tokens, float * y) {
    const size_t    scratch = scratch_size(n_embd), sums = (size_t) (n_tokens * n_embd) * sizeof(float);
    uint8_t * const arena   = pinfer_team_arena(team, (scratch + sums) * (size_t) team->n_threads);
#pragma omp parallel num_threads(team->n_threads)
    {
        const int       ith = omp_get_thread_num(), nth = omp_get_num_threads();
        uint8_t * const own = arena + (scratch + sums) * (size_t) ith;
        float * const   sum = (float *) (own + scratch);
        std::fill(sum, sum + n_tokens * n_embd, 0.0f);
        for (int64_t t = 0; t < n_tokens; t++) {
            const float * const row = h + t * n_ff;
            const void *        rows[GROUP];
            float               f[GROUP];
            int64_t             n   = 0;
            const auto          add = [&] {
                pinfer_kernel_accumulate(neurons.down.kernel, n_embd, n, rows, f, 1, sum + t * n_embd, (float *) own);
                n = 0;
            };
            for (int64_t j = share_begin(neurons.n, ith, nth); j < share_begin(neurons.n, ith + 1, nth); j++) {
                const float value = row[neurons.ids ? neurons.ids[j] : j];
                if (value != 0.0f) {
                    prefetch_row(neurons.down, j, n_embd);
                    rows[n] = row_at(neurons.down, j);
                    f[n++]  = value;
                    if (n == GROUP) {
                        add();
                    }
                }
            }
            add();
        }
#pragma omp barrier
        for (int64_t k = n_tokens * n_embd * ith / nth; k < n_tokens * n_embd * (ith + 1) / nth; k++) {
            float total = 0.0f;
            for (int i = 0; i < nth; i++) {
                total += ((const float *) (arena + (scratch + sums) * (size_t) i + scratch))[k];
            }
            y[k] = total;
        }
    }
}
