// rounding.cuh -- where an approximation may round to another bf16 than the value it stands for.
//
// Two float32 values that are a few ULPs apart round to the same bf16 unless a tie, a value whose low half
// is 0x8000, lies between them or is one of them. So an approximation whose low half is not near 0x8000
// rounds like its exact value: no more than that is asked here, of two values at a time.

#pragma once
#include <stdint.h>

// Watches approximations of which the exact value lies at most kOver ULPs above and kUnder below.
template <int kOver, int kUnder>
class TieWatch {
   public:
    __device__ __forceinline__ void see(float low, float high) {
        constexpr uint32_t kLowHalves = 0x5410, kFromFirst = 0x10000u - (0x8000u - kOver);
        uint32_t halves = __byte_perm(__float_as_uint(low), __float_as_uint(high), kLowHalves);
        nearest_ = __viaddmin_u16x2(halves, kFromFirst << 16 | kFromFirst, nearest_);
    }

    // Whether any value seen may round to another bf16 than its exact value.
    __device__ __forceinline__ bool is_near_tie() const {
        constexpr uint32_t kNear = kOver + kUnder;
        return (nearest_ & 0xffffu) <= kNear || nearest_ >> 16 <= kNear;
    }

   private:
    // Of each half the least distance, upwards, from the first low half that is near a tie.
    uint32_t nearest_ = 0xffffffffu;
};
