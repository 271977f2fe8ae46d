// silu.cuh -- the gated activation of one value: docs/numerics.md section 7.

#pragma once
#include "../common/exp2.cuh"
#include "../common/vector.cuh"

// Before the last rounding; the fused kernels' and silu_and_mul.cu's one definition.
static __device__ __forceinline__ float silu_and_mul(float gate, float up) {
    float e = contract_exp2(__fmul_rn(-gate, __int_as_float(LOG2_E)));
    float silu = to_float(to_bf16(__fdiv_rn(gate, __fadd_rn(1.0f, e))));
    return __fmul_rn(silu, up);
}
