// kernel_check.h: what the kernel tests share: reproducible numbers, the tolerance of a float sum, one line a case.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include <string>
#include <vector>

struct random_source {
    uint64_t state;

    uint32_t next() { // PCG
        const uint64_t old = state;
        state              = old * 6364136223846793005u + 1442695040888963407u;
        const uint32_t mix = (uint32_t) (((old >> 18) ^ old) >> 27), turn = (uint32_t) (old >> 59);
        return (mix >> turn) | (mix << ((32 - turn) & 31));
    }

    double uniform() { return ((double) next() + 0.5) / 4294967296.0; }

    float normal() { return (float) (sqrt(-2.0 * log(uniform())) * cos(6.283185307179586 * uniform())); }

    std::vector<float> normals(int64_t n) {
        std::vector<float> v((size_t) n);
        for (float & f : v) {
            f = normal();
        }
        return v;
    }
};

constexpr double EPS_F32 = 0x1p-24; // relative error of one rounding

// Tolerance of a dot product of n elements summed in n_sums steps. A step is off by at most eps times the partial sum
// so far; the x of these tests have random signs, so a partial sum is about |w||x| / sqrt(n) and the errors of the
// steps grow with the root of their number (four deviations). `terms` is for the roundings of scales and offsets
// before the sum. |w| is to include what cancels within a weight (scale * q against the offset of its block).
inline double dot_tolerance(int64_t n, int64_t n_sums, double terms, double norm_w, double norm_x) {
    return EPS_F32 * (4.0 * sqrt((double) n_sums) + terms) * 2.0 * norm_w * norm_x / sqrt((double) n) + 1e-37;
}

inline double norm(const std::vector<double> & v) {
    double sum = 0.0;
    for (double f : v) {
        sum += f * f;
    }
    return sqrt(sum);
}

// The element that is furthest beyond (or nearest to) its tolerance.
struct worst_element {
    int64_t index    = -1;
    double  got      = 0.0;
    double  expected = 0.0;
    double  ratio    = -1.0; // |got - expected| / tolerance

    void see(int64_t i, double g, double e, double tolerance) {
        const double r = isfinite(g) ? fabs(g - e) / tolerance : INFINITY;
        if (r > ratio) {
            *this = { i, g, e, r };
        }
    }
};

struct report {
    int n_cases  = 0;
    int n_failed = 0;

    void line(const std::string & name, const worst_element & w) {
        const bool ok = w.ratio <= 1.0;
        n_cases++;
        n_failed += !ok;
        printf("%-4s %-34s worst [%lld] %.9g, expected %.9g: %.3f of the tolerance\n", ok ? "ok" : "FAIL", name.c_str(),
               (long long) w.index, w.got, w.expected, w.ratio);
    }

    void check(const std::string & name, bool ok) {
        n_cases++;
        n_failed += !ok;
        printf("%-4s %s\n", ok ? "ok" : "FAIL", name.c_str());
    }

    int finish() const {
        printf("%d cases, %d failed\n", n_cases, n_failed);
        return n_failed ? 1 : 0;
    }
};
