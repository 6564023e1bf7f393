// worker.cpp: scores, first products, and what fires to its end: rows of each are fetched while others are computed.
#include "worker.h"

#include <sys/mman.h>
#include <unistd.h>

namespace pinfer_batch {

namespace {

// So many neurons that fire wait until their other rows have arrived in the cache. Then tokens in a batch take whole tiles of
// them, and a single token takes few: more down rows at a time than the processor can follow would come from the cache late.
constexpr int64_t WAITING = GROUP;
constexpr int64_t FEW     = 8;

// Columns of down rows that a single token adds before other rows are asked for, a multiple of every block size. Requests for
// all of them at once would hold up the arithmetic.
constexpr int64_t SPAN = 256;

// Asks the system for the pages of a row, to be read while others are computed.
void request_row(const pinfer_rows & rows, int64_t j, int64_t n) {
    static const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t        row   = (uintptr_t) row_at(rows, j), end = row + ggml_row_size(rows.kernel->type, n);
    const uintptr_t        begin = row / page * page;
    madvise((void *) begin, end - begin, MADV_WILLNEED);
}

} // namespace

void worker::prepare_x() {
    prepare(s.first.kernel->x_type, s.x, s.job.n_embd, s.x_first);
    if (s.x_second.data != s.x_first.data) {
        prepare(s.second->kernel->x_type, s.x, s.job.n_embd, s.x_second);
    }
    if (s.x_predictor.data != s.x_first.data) {
        prepare(predictor_x_type(*s.predictor), s.x, s.job.n_embd, s.x_predictor);
    }
    lap(PINFER_STEP_PREPARE);
}

void worker::hidden() {
    const int64_t rank = s.predictor->rank;
    const x_view  x    = mine(s.x_predictor);
    pinfer_predictor_hidden(*s.predictor, share_begin(rank, ith, nth), share_begin(rank, ith + 1, nth), x.data, x.row, s.n_tokens, s.hidden);
    lap(PINFER_STEP_SCORE);
}

template <typename Neurons> void worker::compute(Neurons neurons) {
    group two[2];
    neurons.next(&two[0]);
    fetch_first(two[0]);
    for (int k = 0; two[k].n > 0; k = 1 - k) {
        neurons.next(&two[1 - k]);
        fetch_first(two[1 - k]);
        compute_group(two[k]);
    }
    leave();
}

void worker::request_from_disk() const {
    named_neurons neurons(s, ith, nth);
    group         g;
    for (neurons.next(&g); g.n > 0; neurons.next(&g)) {
        for (int64_t r = 0; r < g.n; r++) {
            request_row(s.first, g.in->row + g.list[r], s.job.n_embd);
            if (s.second) {
                request_row(*s.second, g.in->row + g.list[r], s.job.n_embd);
            }
            if (s.down) {
                request_row(*s.down, g.in->down + g.list[r], s.job.n_embd);
            }
        }
    }
}

void worker::enter(const segment & g) {
    at_segment = &g;
    n_tokens   = g.n_tokens;
    mask       = n_tokens >= 32 ? ~0u : (1u << n_tokens) - 1;
    x_first    = mine(s.x_first);
    x_second   = mine(s.x_second);
    z          = mine(s.z);
    y          = total;
    if (s.gathers) {
        uint8_t * to = gathered;
        x_first      = gathered_of(g, s.x_first, &to);
        if (s.second) {
            x_second = s.x_second.data == s.x_first.data ? x_first : gathered_of(g, s.x_second, &to);
        }
        if (s.predictor) {
            z = s.z.data == s.x_first.data ? x_first : gathered_of(g, s.z, &to);
        }
        y = (float *) to;
        std::fill(y, y + n_tokens * s.job.n_embd, 0.0f);
    }
}

void worker::leave() {
    if (!at_segment) {
        return;
    }
    while (n_waiting > 0) {
        finish(std::min(n_waiting, GROUP));
    }
    for (int64_t t = 0; s.gathers && t < n_tokens; t++) {
        const float * const from = y + t * s.job.n_embd;
        float * const       to   = total + at_segment->tokens[t] * s.job.n_embd;
        for (int64_t k = 0; k < s.job.n_embd; k++) {
            to[k] += from[k];
        }
    }
    at_segment = nullptr;
}

void worker::find_in(size_t i) {
    const segment & g     = s.segments[i];
    const int64_t   begin = share_begin(g.n, ith, nth), end = share_begin(g.n, ith + 1, nth);
    int64_t         n     = 0;
    enter(g);
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

void worker::products(const pinfer_rows & rows, size_t size, const x_view & x, const int64_t * list, int64_t n, float * out) {
    if (rows.kernel->multiply && n_tokens > 1) {
        const void * row[GROUP];
        for (int64_t r = 0; r < GROUP; r++) {
            row[r] = row_at(rows, list[std::min(r, n - 1)]);
        }
        computed((size_t) n * size);
        rows.kernel->pack(0, s.job.n_embd, row, tile);
        std::fill(out, out + n_tokens * GROUP, 0.0f);
        rows.kernel->multiply(s.job.n_embd, 0, s.job.n_embd, tile, x.data, x.row, n_tokens, out, GROUP);
    } else {
        for (int64_t r = 0; r < n; r++) {
            float dots[SLAB];
            pinfer_kernel_dot_many(rows.kernel, s.job.n_embd, row_at(rows, list[r]), x.data, x.row, n_tokens, dots);
            for (int64_t t = 0; t < n_tokens; t++) {
                out[t * GROUP + r] = dots[t];
            }
            computed(size);
        }
    }
    for (int64_t r = 0; rows.bias && r < n; r++) {
        for (int64_t t = 0; t < n_tokens; t++) {
            out[t * GROUP + r] += rows.bias[list[r]];
        }
    }
}

void worker::compute_group(const group & g) {
    if (at_segment != g.in) {
        if (s.gathers) {
            leave();
        }
        enter(*g.in);
    }
    const float threshold = s.job.rule.threshold;
    float       out[SLAB * GROUP];
    int64_t     list[GROUP];
    for (int64_t r = 0; r < g.n; r++) {
        list[r] = g.in->row + g.list[r];
    }
    products(s.first, row_first, x_first, list, g.n, out);
    lap(PINFER_STEP_FIRST);
    for (int64_t r = 0; r < g.n; r++) {
        counts.candidates += (uint64_t) __builtin_popcount(g.named[r] & mask);
        pending & p   = waiting(n_waiting);
        bool      any = false;
        for (int64_t t = 0; t < n_tokens; t++) {
            const bool fires = out[t * GROUP + r] > threshold && (g.named[r] >> t & 1);
            p.value[t]       = fires ? out[t * GROUP + r] : 0.0f;
            any |= fires;
        }
        if (any) {
            p.in = g.in;
            p.j  = g.list[r];
            n_waiting++;
            if (s.second) {
                later.add(*s.second, list[r], row_second);
            }
            if (s.down) {
                later.add(*s.down, g.in->down + g.list[r], row_down);
            }
        }
    }
    for (const int64_t n = n_tokens > 1 ? GROUP : FEW; n_waiting >= WAITING + n;) {
        finish(n);
    }
}

void worker::add_down(const void ** rows, const float * f, int64_t n) {
    const int64_t n_embd = s.job.n_embd, span = n_tokens == 1 ? SPAN : n_embd;
    for (int64_t at = 0; at < n_embd; at += span) {
        const int64_t width = std::min(span, n_embd - at);
        const size_t  size  = ggml_row_size(s.down->kernel->type, width);
        pinfer_kernel_accumulate(s.down->kernel, width, n, rows, f, n_tokens, y + at, scratch);
        for (int64_t r = 0; r < n; r++) {
            rows[r] = (const uint8_t *) rows[r] + size;
        }
        computed((size_t) n * size);
    }
    lap(PINFER_STEP_DOWN);
}

void worker::finish(int64_t n) {
    float        out[SLAB * GROUP], f[GROUP * SLAB];
    int64_t      list[GROUP] = {};
    const void * rows[GROUP];
    for (int64_t r = 0; r < n; r++) {
        const pending & p = waiting(r);
        list[r]           = p.in->row + p.j;
        rows[r]           = s.down ? row_at(*s.down, p.in->down + p.j) : nullptr;
    }
    if (s.second) {
        products(*s.second, row_second, x_second, list, n, out);
        lap(PINFER_STEP_SECOND);
    }
    for (int64_t r = 0; r < n; r++) {
        const pending & p = waiting(r);
        for (int64_t t = 0; t < n_tokens; t++) {
            const float g  = p.value[t];
            const float fi = g > 0.0f ? pinfer_activate(s.job.rule, g, s.second ? out[t * GROUP + r] : g) : 0.0f;
            f[r * n_tokens + t] = p.in->weights ? fi * p.in->weights[t] : fi;
            counts.active += fi != 0.0f;
            if (!s.down) {
                s.h[t * s.job.n_ff + neuron_id(s, p.j)] = fi;
            }
        }
    }
    if (s.down) {
        add_down(rows, f, n);
    }
    first_waiting += n;
    n_waiting -= n;
}

void worker::compute_candidates() {
    if (s.from_disk) {
        request_from_disk();
    }
    compute(named_neurons(s, ith, nth));
}

void worker::compute_all() {
    compute(every_neuron(s, ith, nth));
}

} // namespace pinfer_batch
