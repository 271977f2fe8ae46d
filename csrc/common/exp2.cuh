// exp2.cuh -- the contract's exp2: docs/numerics.md section 3, the same bits as twin/exp2.h.

#pragma once
#include <stdint.h>

#include "numerics.h"

constexpr float kSmallestExponent = -126.0f;  // below it the contract's exp2 is zero

// Of an x known to be in [-126, 128): no case is special.
__device__ __forceinline__ float exp2_in_range(float x) {
    // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even, and leaves that integer in the low
    // bits.
    const float kRoundToInteger = 12582912.0f;
    float shifted = __fadd_rn(x, kRoundToInteger);
    float f = __fsub_rn(x, __fsub_rn(shifted, kRoundToInteger));
    float p = __int_as_float(EXP2_C6);
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C5));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C4));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C3));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C2));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C1));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C0));
    // p * 2^n is normal, so the product is an addition to the exponent field.
    return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

__device__ __forceinline__ float contract_exp2(float x) {
    float result = exp2_in_range(x);
    if (x < kSmallestExponent) result = 0.0f;
    if (x >= 128.0f) result = __int_as_float(0x7f800000);
    if (x != x) result = __int_as_float(0x7fffffff);
    return result;
}

// How far above and below ptx.cuh's approximate_exp2 contract_exp2 lies at most, in ULPs, for every float32;
// both are zero, infinite or NaN for the same. tests/kernels/test_rounding.py tries them all. For
// rounding.cuh.
constexpr int kExp2Over = 2;
constexpr int kExp2Under = 2;
