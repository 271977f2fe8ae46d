// vector.cuh -- bf16 in registers: conversions, and eight values as one 16-byte access.

#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kVector = 8;  // bf16 values of the widest access, 16 bytes

// Exact.
__device__ __forceinline__ float to_float(uint16_t value) {
    return __uint_as_float((uint32_t)value << 16);
}

// Nearest even; every NaN becomes 0x7fff.
__device__ __forceinline__ uint16_t to_bf16(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// A product rounded to bf16.
__device__ __forceinline__ float bf16_product(float a, float b) {
    return to_float(to_bf16(__fmul_rn(a, b)));
}

// The two halves of a register that holds two bf16 values, the first in the low half.
__device__ __forceinline__ float low_float(uint32_t pair) {
    return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_float(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// Both rounded as to_bf16 rounds. In PTX: from the intrinsic the compiler takes the pair apart and together
// again.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Eight bf16 values taken apart, worked on in float32, put together again.
__device__ __forceinline__ void unpack(float (&values)[kVector], uint4 packed) {
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = low_float(pairs[i]);
        values[2 * i + 1] = high_float(pairs[i]);
    }
}

__device__ __forceinline__ uint4 pack(const float (&values)[kVector]) {
    return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                      pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}

__device__ __forceinline__ uint4 load_vector(const uint16_t *address) {
    return *reinterpret_cast<const uint4 *>(address);
}

__device__ __forceinline__ void store_vector(uint16_t *address, uint4 value) {
    *reinterpret_cast<uint4 *>(address) = value;
}

// Two neighbouring values as one 4-byte access.
__device__ __forceinline__ uint32_t load_pair(const uint16_t *address) {
    return *reinterpret_cast<const uint32_t *>(address);
}
