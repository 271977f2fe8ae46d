// divergent_barrier.cu -- planted: a block's barrier in a branch that a part of a warp does not take, and a
// warp's barrier by a lane that its mask does not name. synccheck must say so of both.

#include <cuda_runtime.h>

constexpr int kThreads = 64, kValues = 16;

static __global__ void divergent_branch_kernel(int *sum, const int *values, int count) {
    __shared__ int copied[kThreads];
    int i = (int)threadIdx.x;
    if (i < count) {
        copied[i] = values[i];
        __syncthreads();  // the fault: threads from count on never come here
        if (i == 0) {
            for (int j = 0; j < count; ++j) *sum += copied[j];
        }
    }
}

static __global__ void wrong_mask_kernel(int *sum) {
    __shared__ int copied[kThreads];
    int i = (int)threadIdx.x;
    unsigned mask = __ballot_sync(0xffffffffu, i < kValues);
    if (i <= kValues) {  // the fault: one lane more than the mask names
        copied[i] = i;
        __syncwarp(mask);
        if (i == 0) *sum += copied[kValues];
    }
}

int main(void) {
    int *sum, *values;
    if (cudaMalloc(&sum, sizeof(int)) != cudaSuccess) return 2;
    if (cudaMalloc(&values, kThreads * sizeof(int)) != cudaSuccess) return 2;
    if (cudaMemset(values, 0, kThreads * sizeof(int)) != cudaSuccess) return 2;
    if (cudaMemset(sum, 0, sizeof(int)) != cudaSuccess) return 2;
    divergent_branch_kernel<<<1, kThreads>>>(sum, values, kValues);
    (void)cudaDeviceSynchronize();
    wrong_mask_kernel<<<1, 32>>>(sum);
    (void)cudaDeviceSynchronize();
    (void)cudaFree(values);
    (void)cudaFree(sum);
    return 0;
}
