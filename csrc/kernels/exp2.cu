// exp2.cu -- the contract's exp2 on its own, so that it can be proved.
//
//   out[i] = exp2(x[i])
//
// Shapes    x, out [n] float32
// Rounding  docs/numerics.md section 3: a polynomial in fused multiply-adds, then an exact scaling
// Mapping   one thread per value
// Cost      8 bytes per value: memory-bound
// See       common/exp2.cuh, twin/exp2.h, tests/kernels/test_bits_elementwise.py

#include "../common/cuda_status.h"
#include "../common/exp2.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // full occupancy at any register count

static __global__ void exp2_kernel(float *out, const float *x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (i < n) out[i] = contract_exp2(x[i]);
}

extern "C" Status cuda_exp2(float *out, const float *x, int64_t n, Stream stream) {
    if (n == 0) return STATUS_OK;
    int64_t num_blocks = (n + kThreads - 1) / kThreads;
    exp2_kernel<<<(unsigned)num_blocks, kThreads, 0, (cudaStream_t)stream>>>(out, x, n);
    return CUDA_STATUS(cudaGetLastError());
}
