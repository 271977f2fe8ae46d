// rms_norm.cu -- scale each token's hidden vector to unit root mean square.
//
//   out[t, h] = bf16(weight[h] * bf16(x[t, h] / sqrt(mean_h(x[t, h]^2) + eps)))
//
// Shapes    x, out [num_tokens, hidden_size]; weight [hidden_size]; all bf16
// Rounding  squares, mean and 1/sqrt in fp32 with the fixed tree of docs/numerics.md section 5; to bf16
//           before the weight, as transformers does
// Mapping   one thread block per token; thread i is lane i of the tree: eight values (16 bytes) per load
// Cost      4 bytes per value (the second read comes from cache): memory-bound
// Source    transformers LlamaRMSNorm.forward; Zhang & Sennrich, arXiv:1910.07467
// See       twin/rms_norm.c, tests/kernels/test_bits_rms_norm.py

#include "../common/launch.cuh"
#include "../common/ptx.cuh"
#include "../common/reduce.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = NUMERICS_NORM_LANES;  // the tree's lanes
static_assert(NUMERICS_NORM_RUN == kVector, "a lane's run is one 16-byte load");

// kAligned: hidden_size is a multiple of eight, so every run is whole and on a 16-byte boundary.
template <bool kAligned>
static __global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(bf16 *out, const bf16 *x, const bf16 *weight, int hidden_size, float eps) {
    __shared__ float warp_sums[kThreads / kWarp];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const bf16 *x_row = x + (size_t)blockIdx.x * hidden_size;
    bf16 *out_row = out + (size_t)blockIdx.x * hidden_size;
    float lane_sum = 0.0f;
    for (int first = (int)threadIdx.x * kVector; first < hidden_size; first += kThreads * kVector) {
        if constexpr (kAligned) {
            float values[kVector];
            unpack(values, load_vector(x_row + first));
#pragma unroll
            for (int i = 0; i < kVector; ++i)
                lane_sum = __fadd_rn(lane_sum, __fmul_rn(values[i], values[i]));
        } else {
            for (int h = first; h < min(first + kVector, hidden_size); ++h) {
                float value = to_float(x_row[h]);
                lane_sum = __fadd_rn(lane_sum, __fmul_rn(value, value));
            }
        }
    }
    float mean = __fdiv_rn(block_tree_sum(lane_sum, warp_sums), (float)hidden_size);
    float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, eps)));
    for (int first = (int)threadIdx.x * kVector; first < hidden_size; first += kThreads * kVector) {
        if constexpr (kAligned) {
            float values[kVector], weights[kVector];
            unpack(values, load_vector(x_row + first));
            unpack(weights, load_vector(weight + first));
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                values[i] = __fmul_rn(weights[i], to_float(to_bf16(__fmul_rn(values[i], scale))));
            }
            store_vector(out_row + first, pack(values));
        } else {
            for (int h = first; h < min(first + kVector, hidden_size); ++h) {
                float normalised = to_float(to_bf16(__fmul_rn(to_float(x_row[h]), scale)));
                out_row[h] = to_bf16(__fmul_rn(to_float(weight[h]), normalised));
            }
        }
    }
}

extern "C" Status cuda_rms_norm(bf16 *out, const bf16 *x, const bf16 *weight, int num_tokens,
                                int hidden_size, float eps, Stream stream) {
    if (num_tokens == 0) return STATUS_OK;
    auto *kernel = hidden_size % kVector == 0 ? rms_norm_kernel<true> : rms_norm_kernel<false>;
    return launch_chained(kernel, dim3((unsigned)num_tokens), kThreads, 0, 1, (cudaStream_t)stream, out, x,
                          weight, hidden_size, eps);
}
