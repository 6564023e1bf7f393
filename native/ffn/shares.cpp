// shares.cpp: shares of equal cost, dealt out to the thread that has the least.
#include "shares.h"

#include <algorithm>
#include <numeric>

// Shares of a thread: with more of them they even out better, and cost more to begin and end.
static const int64_t SHARES = 16;

std::vector<pinfer_share> pinfer_share_out(const std::vector<pinfer_work> & work, int64_t group, int64_t most, int n_threads) {
    const int64_t n_neurons = std::accumulate(work.begin(), work.end(), (int64_t) 0, [](int64_t n, const pinfer_work & w) { return n + w.n; });
    const int64_t even      = n_neurons / (SHARES * n_threads) / group * group;
    const bool    whole     = (int64_t) work.size() >= SHARES * n_threads;
    const int64_t length    = whole ? std::max(group, n_neurons) : std::clamp(even, group, most);

    std::vector<pinfer_share> shares;
    std::vector<int64_t>      load((size_t) n_threads, 0);
    for (size_t i = 0; i < work.size(); i++) {
        for (int64_t begin = 0; begin < work[i].n; begin += length) {
            const int64_t end   = std::min(work[i].n, begin + length);
            const auto    least = std::min_element(load.begin(), load.end());
            *least += (end - begin) * work[i].cost;
            shares.push_back({(int32_t) i, (int32_t) (least - load.begin()), begin, end});
        }
    }
    return shares;
}
