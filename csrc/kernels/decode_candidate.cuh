// decode_candidate.cuh -- arg-max's total order, for kernels that compare logits where they compute them.

#pragma once
#include "../common/vector.cuh"

// A logit and where it stands; the better of two is the larger value, then the lower id; NaN above every
// number.
struct Candidate {
    float value;
    int id;

    __device__ void take_better(float other, int other_id) {
        bool is_nan = value != value, other_is_nan = other != other;
        bool is_better = is_nan != other_is_nan      ? other_is_nan
                         : !is_nan && value != other ? other > value
                                                     : other_id < id;
        if (is_better) {
            value = other;
            id = other_id;
        }
    }
    __device__ void take_best_of_warp() {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
            float other = __shfl_xor_sync(kFullWarp, value, offset);
            int other_id = __shfl_xor_sync(kFullWarp, id, offset);
            take_better(other, other_id);
        }
    }
};
__device__ __forceinline__ Candidate no_candidate() {
    return {__int_as_float(0xff800000), 0x7fffffff};
}
