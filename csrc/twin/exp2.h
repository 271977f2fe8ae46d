// exp2.h -- the contract's exp2: one polynomial for softmax and SiLU, on every backend the same bits.
//
// Source    docs/numerics.md section 3
// See       common/exp2.cuh, tests/twin/test_exp2.py

#pragma once
#include <math.h>
#include "../common/numerics.h"
#include "../common/bf16.h"

// A function with a second copy for processors that have fused multiply-adds: the same bits, where fmaf
// would be a call.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FMA_CLONES __attribute__((target_clones("fma", "default")))
#endif
#endif
#ifndef FMA_CLONES
#define FMA_CLONES
#endif

static inline float numerics_constant(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float contract_exp2(float x) {
    if (x != x) return x;
    if (x >= 128.0f) return INFINITY;
    if (x < -126.0f) return 0.0f;
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer, ties to even
    float n = (x + shifter) - shifter;
    float f = x - n;
    float p = numerics_constant(EXP2_C6);
    p = fmaf(p, f, numerics_constant(EXP2_C5));
    p = fmaf(p, f, numerics_constant(EXP2_C4));
    p = fmaf(p, f, numerics_constant(EXP2_C3));
    p = fmaf(p, f, numerics_constant(EXP2_C2));
    p = fmaf(p, f, numerics_constant(EXP2_C1));
    p = fmaf(p, f, numerics_constant(EXP2_C0));
    uint32_t bits;
    memcpy(&bits, &p, sizeof bits);
    bits += (uint32_t)(int32_t)n << 23;
    memcpy(&p, &bits, sizeof p);
    return p;
}
