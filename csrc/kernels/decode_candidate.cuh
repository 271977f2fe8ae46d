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
    // In two instructions that compare integers.
    __device__ void take_best_of_warp() {
        constexpr unsigned kNan = 0xffffffff, kSign = 0x80000000;
        unsigned bits = __float_as_uint(__fadd_rn(value, 0.0f));  // -0 is +0
        unsigned order = value != value ? kNan : bits & kSign ? ~bits : bits | kSign;
        unsigned best = __reduce_max_sync(kFullWarp, order);
        id = (int)__reduce_min_sync(kFullWarp, order == best ? (unsigned)id : kNan);
        value = __uint_as_float(best == kNan ? best >> 1 : best & kSign ? best & ~kSign : ~best);
    }
};
__device__ __forceinline__ Candidate no_candidate() {
    return {__int_as_float(0xff800000), 0x7fffffff};
}
