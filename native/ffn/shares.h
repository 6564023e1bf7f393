// shares.h: which thread computes which neurons.
#pragma once

#include <cstdint>
#include <vector>

// n neurons that cost the same each.
struct pinfer_work {
    int64_t n = 0;
    int64_t cost = 1;
};

// Neurons [begin, end) of a work, for one thread.
struct pinfer_share {
    int32_t work = 0, thread = 0;
    int64_t begin = 0, end = 0;
};

// Even shares, in the order of the work; the same for the same work and threads. They begin at multiples of `group` neurons and
// are of `most` at most: small where there are few neurons for many threads. Where there is more work than threads need,
// each is one thread's as a whole.
std::vector<pinfer_share> pinfer_share_out(const std::vector<pinfer_work> & work, int64_t group, int64_t most, int n_threads);
