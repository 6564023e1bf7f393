// fetch.h: rows on their way from memory to the cache.
#pragma once

#include "cold.h"

#include <cstddef>
#include <cstdint>

// Scattered rows are too short for the hardware's prefetcher to get going, so every line is asked for. The requests are
// spread over the computation of rows that were asked for before: a processor with many outstanding stops computing until
// some are served.
class pinfer_fetches {
public:
    // Lines to ask for when `size` bytes of other rows have been computed: some more than these, to catch up.
    static size_t lines(size_t size) { return size / LINE + size / LINE / 4 + 1; }

    void add(const pinfer_rows & rows, int64_t j, size_t size) {
        if (head - tail == MOST) {
            step(SIZE_MAX);
        }
        const uintptr_t row = (uintptr_t) rows.data + (size_t) j * rows.stride;
        ring[head++ % MOST] = {row / LINE * LINE, row + size};
    }

    // Asks for the next n lines; returns how many of n are left where there are fewer. Into the second level: the first has
    // too few outstanding misses (measured on Zen 4: 26 against 15 GB/s).
    size_t step(size_t n) {
        for (; tail != head; tail++) {
            range & r = ring[tail % MOST];
            for (; r.at < r.end; r.at += LINE) {
                if (n == 0) {
                    return 0;
                }
                __builtin_prefetch((const void *) r.at, 0, 2);
                n--;
            }
        }
        return n;
    }

private:
    static constexpr size_t LINE = 64, MOST = 256;

    struct range {
        uintptr_t at, end;
    };

    range  ring[MOST];
    size_t head = 0, tail = 0;
};
