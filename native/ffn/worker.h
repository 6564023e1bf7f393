// worker.h: one thread of those that compute a batch.
#pragma once

#include "batch.h"
#include "fetch.h"
#include "walk.h"

#include <cstring>

namespace pinfer_batch {

class worker {
public:
    worker(const shared & shared, int ith, int nth, pinfer_stopwatch * watch) : s(shared), ith(ith), nth(nth), watch(watch) {
        lap(PINFER_STEP_OTHER);
        uint8_t * own = s.own + (size_t) ith * s.own_size;
        tile          = own;
        own += pinfer_tile_size(s.job.n_embd);
        row_first  = ggml_row_size(s.first.kernel->type, s.job.n_embd);
        row_second = s.second ? ggml_row_size(s.second->kernel->type, s.job.n_embd) : 0;
        if (s.down) {
            const int64_t n = s.n_tokens * s.job.n_embd;
            row_down        = ggml_row_size(s.down->kernel->type, s.job.n_embd);
            total           = s.partial + ith * n;
            std::fill(total, total + n, 0.0f);
            scratch = (float *) own;
            own += scratch_size(s.job.n_embd);
        }
        gathered = own;
    }

    // x in the types of the rows. Of one token every thread makes its own: that is sooner done than waited for.
    void prepare_x();

    void prepare_z() {
        prepare(s.predictor->b_kernel->x_type, s.hidden, s.predictor->rank, s.z);
        lap(PINFER_STEP_PREPARE);
    }

    // The rows of A that are this thread's.
    void hidden();

    // The candidates among the neurons that are this thread's, of every segment.
    void find_candidates() {
        for (size_t i = 0; i < s.segments.size(); i++) {
            find_in(i);
        }
        lap(PINFER_STEP_SCORE);
    }

    void compute_candidates();

    void compute_all();

    void lap(pinfer_step step) {
        if (watch) {
            watch->lap(step);
        }
    }

    pinfer_sparse_counts counts;

private:
    // A neuron that fires.
    struct pending {
        const segment * in;
        int32_t         j;
        float           value[SLAB]; // first products, 0 where a token has no use for it
    };

    bool alone() const { return s.n_tokens == 1; }

    x_view mine(x_view x) const { return alone() ? x_view{x.token(ith), x.row} : x; }

    void prepare(ggml_type type, const float * x, int64_t n, const x_view & out) const {
        for (int64_t t = alone() ? 0 : ith; t < s.n_tokens; t += alone() ? 1 : nth) {
            pinfer_kernel_prepare(type, x + t * n, const_cast<uint8_t *>(out.token(alone() ? ith : t)), n);
        }
    }

    template <typename Neurons> void compute(Neurons neurons);

    // The rows of all neurons that this thread is going to compute, so that the disk works on all of them at once.
    void request_from_disk() const;

    void fetch_first(const group & g) {
        for (int64_t r = 0; r < g.n; r++) {
            soon.add(s.first, g.in->row + g.list[r], row_first);
        }
    }

    // `size` bytes of rows have been computed, others are asked for.
    void computed(size_t size) { later.step(soon.step(pinfer_fetches::lines(size))); }

    void enter(const segment & g);

    // The rows of the segment's tokens, one after another at *to, which moves past them.
    static x_view gathered_of(const segment & g, x_view x, uint8_t ** to) {
        for (int64_t t = 0; t < g.n_tokens; t++) {
            memcpy(*to + (size_t) t * x.row, x.token(g.tokens[t]), x.row);
        }
        x.data = *to;
        *to += (size_t) SLAB * x.row;
        return x;
    }

    void leave();

    void find_in(size_t i);

    // out[t*GROUP + r] = row list[r] of rows . x_t, with bias, for the n <= GROUP rows of the list.
    void products(const pinfer_rows & rows, size_t size, const x_view & x, const int64_t * list, int64_t n, float * out);

    void compute_group(const group & g);

    pending & waiting(int64_t i) { return ring[(size_t) (first_waiting + i) % (sizeof(ring) / sizeof(*ring))]; }

    // The first n <= GROUP neurons that wait: f_i(x) from the first product, then what they add to the output.
    void finish(int64_t n);
    // y += the down rows of n neurons, times f [n, n_tokens]
    void add_down(const void ** rows, const float * f, int64_t n);

    const shared &  s;
    int             ith, nth;
    pinfer_stopwatch * watch; // null: another thread's
    uint8_t *       tile = nullptr;
    float *         total = nullptr;    // [n_tokens of the batch, n_embd]: what this thread adds to the output
    float *         scratch = nullptr;  // [n_embd]
    uint8_t *       gathered = nullptr; // x and y of a segment's tokens
    size_t          row_first = 0, row_second = 0, row_down = 0; // bytes
    pinfer_fetches  soon, later; // rows of the next first products; rows of neurons that wait
    // of the segment
    const segment * at_segment = nullptr;
    int64_t         n_tokens = 0;
    uint32_t        mask = 0; // a bit for each token
    x_view          x_first, x_second, z;
    float *         y = nullptr; // [n_tokens, n_embd]
    int64_t         first_waiting = 0, n_waiting = 0;
    pending         ring[4 * GROUP];
};

} // namespace pinfer_batch
