// scalar.cpp: the step in plain floats, which the other instruction sets are tested against.
#include "step.h"
#include "blocks.h"

#include <math.h>

namespace {

typedef float vec;

constexpr int VEC_LANES = 1;
constexpr int VEC_SUMS  = 4;

vec vec_zero(void) {
    return 0.0f;
}

vec vec_set1(float f) {
    return f;
}

vec vec_load(const float * p) {
    return *p;
}

vec vec_load_f16(const void * p) {
    return load_f16((const uint8_t *) p);
}

vec vec_set1_f16(const void * p) {
    return load_f16((const uint8_t *) p);
}

vec vec_load_i8(const int8_t * p) {
    return (float) *p;
}

template <int shift> vec vec_load_nibbles(const uint8_t * p) {
    return (float) (*p >> shift & 15);
}

void vec_store(float * p, vec v) {
    *p = v;
}

vec vec_add(vec a, vec b) {
    return a + b;
}

vec vec_mul(vec a, vec b) {
    return a * b;
}

vec vec_fma(vec a, vec b, vec c) {
    return a * b + c;
}

vec vec_max(vec a, vec b) {
    return a > b ? a : b;
}

vec vec_round(vec v) {
    return nearbyintf(v);
}

vec vec_times_power(vec v, vec n) {
    return isnan(n) ? n : ldexpf(v, (int) n);
}

vec vec_zero_where_below(vec v, vec x, float limit) {
    return x < limit ? 0.0f : v;
}

vec vec_masked(vec v, vec m) {
    return m == -INFINITY ? m : v;
}

float vec_sum(vec v) {
    return v;
}

float vec_largest(vec v) {
    return v;
}

void vec_sums(const float * p, float * out) {
    memcpy(out, p, PINFER_BLOCK_POSITIONS * sizeof(float));
}

} // namespace

#include "body.h"

const struct pinfer_attention_table pinfer_attention_scalar = {.isa = "scalar", .attend = attend};
