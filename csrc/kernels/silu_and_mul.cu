// silu_and_mul.cu -- the gated activation of the MLP.
//
//   out[i] = bf16(bf16(gate[i] / (1 + exp2(-gate[i] log2 e))) * up[i])
//
// Shapes    gate, up, out [num_values] bf16
// Rounding  silu in fp32, to bf16 before the product, as transformers does; exp2 is the contract's own
// Mapping   eight values (16 bytes) per thread
// Cost      6 bytes and about 20 instructions per value: memory-bound
// Source    transformers LlamaMLP.forward; Shazeer, arXiv:2002.05202
// See       twin/silu_and_mul.c, tests/kernels/test_bits_elementwise.py

#include "../common/cuda_status.h"
#include "silu.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // full occupancy at any register count

static __global__ void silu_and_mul_kernel(bf16 *out, const bf16 *gate, const bf16 *up,
                                           int64_t num_values) {
    int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kVector;
    if (first + kVector <= num_values) {
        float g[kVector], u[kVector];
        unpack(g, load_vector(gate + first));
        unpack(u, load_vector(up + first));
#pragma unroll
        for (int i = 0; i < kVector; ++i) g[i] = silu_and_mul(g[i], u[i]);
        store_vector(out + first, pack(g));
        return;
    }
    for (int64_t i = first; i < num_values; ++i) {
        out[i] = to_bf16(silu_and_mul(to_float(gate[i]), to_float(up[i])));
    }
}

extern "C" Status cuda_silu_and_mul(bf16 *out, const bf16 *gate, const bf16 *up, int64_t num_values,
                                    Stream stream) {
    if (num_values == 0) return STATUS_OK;
    constexpr int64_t kValuesPerBlock = (int64_t)kThreads * kVector;
    int64_t num_blocks = (num_values + kValuesPerBlock - 1) / kValuesPerBlock;
    silu_and_mul_kernel<<<(unsigned)num_blocks, kThreads, 0, (cudaStream_t)stream>>>(out, gate, up,
                                                                                     num_values);
    return CUDA_STATUS(cudaGetLastError());
}
