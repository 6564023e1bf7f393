// test_shares.cpp: every neuron is computed once, and no thread has much more to do than the others, at any number of them.
#include "batch.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>

namespace {

int failures = 0;

void check(bool ok, const char * what, int n_threads, double value) {
    if (!ok) {
        printf("FAIL %s with %d threads: %g\n", what, n_threads, value);
        failures++;
    }
}

// The largest load of a thread over the mean.
double unevenness(const std::vector<pinfer_work> & work, const std::vector<pinfer_share> & shares, int n_threads) {
    std::vector<double> load((size_t) n_threads, 0.0);
    for (const pinfer_share & s : shares) {
        load[(size_t) s.thread] += (double) ((s.end - s.begin) * work[(size_t) s.work].cost);
    }
    return *std::max_element(load.begin(), load.end()) * n_threads / std::accumulate(load.begin(), load.end(), 0.0);
}

void test(const char * what, const std::vector<pinfer_work> & work, int n_threads, double most) {
    const auto                 shares = pinfer_share_out(work, 16, 256, n_threads);
    std::map<int32_t, int64_t> reached; // shares are in order, without gaps
    bool                       whole = true, multiples = true;
    for (const pinfer_share & s : shares) {
        whole     = whole && reached[s.work] == s.begin && s.end > s.begin && s.thread >= 0 && s.thread < n_threads;
        multiples = multiples && s.begin % 16 == 0;
        reached[s.work] = s.end;
    }
    for (size_t i = 0; i < work.size(); i++) {
        whole = whole && reached[(int32_t) i] == work[i].n;
    }
    check(whole, what, n_threads, -1);
    check(multiples, what, n_threads, -2);
    const double found = unevenness(work, shares, n_threads);
    check(!(found > most), what, n_threads, found);
    const auto again = pinfer_share_out(work, 16, 256, n_threads);
    check(std::equal(shares.begin(), shares.end(), again.begin(), again.end(),
                     [](const pinfer_share & a, const pinfer_share & b) {
                         return a.work == b.work && a.thread == b.thread && a.begin == b.begin && a.end == b.end;
                     }),
          what, n_threads, -3);
}

// Parts of n in steps: the largest over the mean.
double unevenness_of_parts(int64_t n, int n_threads, int64_t step) {
    int64_t most = 0;
    for (int i = 0; i < n_threads; i++) {
        most = std::max(most, pinfer_batch::share_begin(n, i + 1, n_threads, step) - pinfer_batch::share_begin(n, i, n_threads, step));
    }
    return (double) most * n_threads / (double) n;
}

} // namespace

int main() {
    for (const int n_threads : {1, 2, 3, 8, 16, 32, 64}) {
        for (const int64_t n : {11008, 14336, 16384, 18432, 28672, 32768}) {
            test("one FFN", {{n, 5}}, n_threads, 1.05);
        }
        test("six experts of a token", std::vector<pinfer_work>(6, {1856, 5}), n_threads, 1.05);
        std::vector<pinfer_work> prompt; // a prompt: 128 experts, some with many tokens
        for (int e = 0; e < 128; e++) {
            prompt.push_back({1856, 4 + 1 + (e * 37) % 32});
        }
        test("the experts of a prompt", prompt, n_threads, n_threads <= 16 ? 1.25 : 1.1);
    }
    for (const int n_threads : {2, 3, 8, 16, 32, 64}) {
        for (const int64_t n : {11008, 14336, 16384, 28672}) {
            const double scored = unevenness_of_parts(n, n_threads, PINFER_TILE_ROWS);
            check(scored <= 1.05, "neurons that are scored", n_threads, scored);
            const double computed = unevenness_of_parts(n / 10 + 7, n_threads, 1);
            check(computed <= 1.05, "candidates", n_threads, computed);
        }
    }
    test("nothing", {}, 4, 1e9);
    printf("%d failures\n", failures);
    return failures > 0;
}
