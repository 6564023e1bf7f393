// sparse.cpp: the sparse executor. Candidates are named (predictor) or all (exact), 16 at a time their first product
// decides which fire, and only those are finished: the second product where there is one, then the sum of their down rows.
// Every thread takes an equal share of the candidates and sums its own; the sums meet in thread order, so one thread
// count gives one result.
#include "sparse.h"

#include "fetch.h"
#include "worker.h"

#include <algorithm>
#include <omp.h>
#include <sys/resource.h>

using namespace pinfer_batch;

namespace {

// Neurons a thread takes at a time where all are computed, at most: they are sorted by falling impact, so that the first ones
// fire far more often.
constexpr int64_t CHUNK = 16 * GROUP;

// What unpacking a row costs, in products with it.
constexpr int64_t UNPACKING = 4;

// Bytes of the sums of all threads.
constexpr int64_t SUMS = 64 << 20;

// Whether this process has read from disk since the last call: then the shard is not in memory, or not yet.
bool reads_from_disk(pinfer_team * team) {
    rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    const bool reads = usage.ru_inblock != team->blocks_read;
    team->blocks_read   = usage.ru_inblock;
    return reads;
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
        worker    w(s, ith, nth, ith == 0 ? &team->watch : nullptr);
        w.prepare_x();
        if (s.n_tokens > 1) {
#pragma omp barrier
            w.lap(PINFER_STEP_WAIT);
        }
        if (p) {
            if (!p->bits) {
                w.hidden();
#pragma omp barrier
                w.lap(PINFER_STEP_WAIT);
                w.prepare_z();
                if (s.n_tokens > 1) {
#pragma omp barrier
                    w.lap(PINFER_STEP_WAIT);
                }
            }
            w.find_candidates();
#pragma omp barrier
            w.lap(PINFER_STEP_WAIT);
            w.compute_candidates();
        } else {
            w.compute_all();
        }
        candidates += w.counts.candidates;
        active += w.counts.active;
        if (s.down) {
#pragma omp barrier
            w.lap(PINFER_STEP_WAIT);
            sum_up(s, ith, nth, y);
            w.lap(PINFER_STEP_SUM);
        }
    }
    team->watch.lap(PINFER_STEP_WAIT);
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
    const size_t    size    = ggml_row_size(neurons.down.kernel->type, n_embd);
    const size_t    scratch = scratch_size(n_embd), sums = (size_t) (n_tokens * n_embd) * sizeof(float);
    uint8_t * const arena   = pinfer_team_arena(team, (scratch + sums) * (size_t) team->n_threads);
#pragma omp parallel num_threads(team->n_threads)
    {
        const int       ith = omp_get_thread_num(), nth = omp_get_num_threads();
        uint8_t * const own = arena + (scratch + sums) * (size_t) ith;
        float * const   sum = (float *) (own + scratch);
        pinfer_fetches  fetches;
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
                    fetches.add(neurons.down, j, size);
                    fetches.step(SIZE_MAX);
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
