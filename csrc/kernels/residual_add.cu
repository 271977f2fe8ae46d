// residual_add.cu -- add a block's output to the residual stream.
//
//   out[i] = bf16(x[i] + y[i])
//
// Shapes    x, y, out [num_values] bf16; out may be x or y
// Rounding  sum in fp32, then to bf16, as transformers' bf16 addition does
// Mapping   eight values (16 bytes) per thread
// Cost      6 bytes per value: memory-bound
// Source    transformers LlamaDecoderLayer.forward
// See       twin/residual_add.c, tests/kernels/test_bits_elementwise.py

#include "../common/cuda_status.h"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // full occupancy at any register count

static __global__ void residual_add_kernel(bf16 *out, const bf16 *x, const bf16 *y, int64_t num_values) {
    int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kVector;
    if (first + kVector <= num_values) {
        float a[kVector], b[kVector];
        unpack(a, load_vector(x + first));
        unpack(b, load_vector(y + first));
#pragma unroll
        for (int i = 0; i < kVector; ++i) a[i] = __fadd_rn(a[i], b[i]);
        store_vector(out + first, pack(a));
        return;
    }
    for (int64_t i = first; i < num_values; ++i)
        out[i] = to_bf16(__fadd_rn(to_float(x[i]), to_float(y[i])));
}

extern "C" Status cuda_residual_add(bf16 *out, const bf16 *x, const bf16 *y, int64_t num_values,
                                    Stream stream) {
    if (num_values == 0) return STATUS_OK;
    constexpr int64_t kValuesPerBlock = (int64_t)kThreads * kVector;
    int64_t num_blocks = (num_values + kValuesPerBlock - 1) / kValuesPerBlock;
    residual_add_kernel<<<(unsigned)num_blocks, kThreads, 0, (cudaStream_t)stream>>>(out, x, y, num_values);
    return CUDA_STATUS(cudaGetLastError());
}
