// weight.h -- a token's probability as an integer: sums of integers are exact, so no order enters them.
//
// Source    docs/numerics.md section 8
// See       kernels/weight.cuh, tests/twin/test_sample.py

#pragma once
#include "exp2.h"

// p relative to the most likely token's: exp2((logit - largest) * scale).
static inline float relative_probability(float logit, float largest, float scale) {
    return contract_exp2((logit - largest) * scale);
}

// In units of 2^-38, cut: the product is exact.
static inline uint64_t weight_of(float probability) {
    return (uint64_t)(probability * (float)(1ull << NUMERICS_WEIGHT_BITS));
}
