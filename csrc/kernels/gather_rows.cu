// gather_rows.cu -- pick whole rows: the hidden vectors whose logits are wanted.
//
//   out[i] = x[indices[i]]
//
// Shapes    x [.., width], out [num_rows, width] bf16; indices [num_rows]; width a multiple of 8
// Rounding  none: a copy
// Mapping   one thread block per row, 16 bytes per thread and step
// Cost      4 bytes per value: memory-bound
// See       twin/embedding.c, tests/kernels/test_bits_copies.py

#include "../common/cuda_status.h"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // 256 x 8 values: a hidden vector of 2048 in one pass

static __global__ void gather_rows_kernel(bf16 *out, const bf16 *x, const int32_t *indices, int width) {
    const bf16 *from = x + (size_t)indices[blockIdx.x] * width;
    bf16 *to = out + (size_t)blockIdx.x * width;
    for (int first = (int)threadIdx.x * kVector; first < width; first += kThreads * kVector) {
        store_vector(to + first, load_vector(from + first));
    }
}

extern "C" Status cuda_gather_rows(bf16 *out, const bf16 *x, const int32_t *indices, int num_rows,
                                   int width, Stream stream) {
    if (num_rows == 0) return STATUS_OK;
    if (width % kVector != 0) {
        return fail(STATUS_INVALID_ARGUMENT, "width must be a multiple of %d, got %d", kVector, width);
    }
    gather_rows_kernel<<<num_rows, kThreads, 0, (cudaStream_t)stream>>>(out, x, indices, width);
    return CUDA_STATUS(cudaGetLastError());
}
