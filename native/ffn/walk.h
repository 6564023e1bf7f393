// walk.h: the neurons that a thread computes, in their order, some at a time.
#pragma once

#include "batch.h"

#include <numeric>

namespace pinfer_batch {

// Neurons of a segment that are computed together.
struct group {
    const segment * in = nullptr;
    int64_t         n = 0; // 0: there is none
    int32_t         list[GROUP];
    uint32_t        named[GROUP]; // bit t: token t of the segment needs the neuron
};

// All neurons, in the shares of a thread.
class every_neuron {
public:
    every_neuron(const shared & s, int ith, int nth) : s(s), ith(ith), nth(nth) {}

    void next(group * g) {
        while (at == end && share < s.shares.size()) {
            const pinfer_share & now = s.shares[share++];
            if (now.thread % nth == ith) {
                g->in = &s.segments[(size_t) now.work];
                at    = now.begin;
                end   = now.end;
                in    = g->in;
            }
        }
        g->in = in;
        g->n  = std::min(GROUP, end - at);
        std::iota(g->list, g->list + GROUP, (int32_t) at);
        std::fill(g->named, g->named + GROUP, ~0u);
        at += g->n;
    }

private:
    const shared &  s;
    int             ith, nth;
    size_t          share = 0;
    const segment * in = nullptr;
    int64_t         at = 0, end = 0;
};

// The candidates, of every segment an equal part for each thread. Those of a segment lie in pieces, as threads found them.
class named_neurons {
public:
    named_neurons(const shared & s, int ith, int nth) : s(s), ith(ith), nth(nth), piece(nth) {}

    void next(group * g) {
        while (at == end && (piece < nth || segment_after < s.segments.size())) {
            if (piece == nth) {
                enter(s.segments[segment_after]);
                segment_after++;
            }
            const int64_t from = std::max(begin_part, before), to = std::min(end_part, before + found[piece]);
            const int64_t first = in->place + share_begin(in->n, piece, nth) - before;
            if (from < to) {
                at  = first + from;
                end = first + to;
            }
            before += found[piece++];
        }
        g->in = in;
        g->n  = std::min(GROUP, end - at);
        std::copy(s.candidates + at, s.candidates + at + g->n, g->list);
        std::copy(s.named + at, s.named + at + g->n, g->named);
        at += g->n;
    }

private:
    void enter(const segment & next) {
        in                = &next;
        found             = s.n_found + (int64_t) segment_after * nth;
        const int64_t sum = std::accumulate(found, found + nth, (int64_t) 0);
        begin_part        = share_begin(sum, ith, nth, 1);
        end_part          = share_begin(sum, ith + 1, nth, 1);
        before            = 0;
        piece             = 0;
    }

    const shared &  s;
    int             ith, nth;
    int             piece; // after the one at hand
    size_t          segment_after = 0;
    const segment * in = nullptr;
    const int64_t * found = nullptr;
    int64_t         begin_part = 0, end_part = 0; // of the segment's candidates
    int64_t         before = 0;                   // candidates of the pieces before
    int64_t         at = 0, end = 0;              // what is left of the piece at hand, in s.candidates
};

} // namespace pinfer_batch
