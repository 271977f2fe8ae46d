// silu.cuh -- the gated activation of one value: docs/numerics.md section 7.
//
// silu is wanted rounded to bf16 alone, of a bf16 gate: the special function unit's exp2 and reciprocal
// give the contract's bits of all 65536, at a quarter of the instructions. tests/kernels/test_rounding.py
// tries each on the card.

#pragma once
#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/vector.cuh"

// Within 3 ULPs of the contract's silu before rounding, and never across a tie. A quarter of the gate over
// a quarter of the divisor, which is exact: so the reciprocal is never denormal.
static __device__ __forceinline__ float approximate_silu(float gate) {
    float e = approximate_exp2(__fmul_rn(-gate, __int_as_float(LOG2_E)));
    return __fmul_rn(__fmul_rn(gate, 0.25f), approximate_reciprocal(__fmaf_rn(e, 0.25f, 0.25f)));
}

// Before the last rounding; the fused kernels' and silu_and_mul.cu's one definition.
static __device__ __forceinline__ float silu_and_mul(float gate, float up) {
    return __fmul_rn(to_float(to_bf16(approximate_silu(gate))), up);
}
