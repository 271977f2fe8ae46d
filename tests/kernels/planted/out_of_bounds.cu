// out_of_bounds.cu -- planted: the last thread writes one element behind an array. memcheck must say so.

#include <cuda_runtime.h>

static __global__ void out_of_bounds_kernel(int *out, int count) {
    int i = (int)threadIdx.x;
    if (i <= count) out[i] = i;  // the fault: <= for <
}

int main(void) {
    constexpr int kCount = 32;
    int *out;
    if (cudaMalloc(&out, kCount * sizeof(int)) != cudaSuccess) return 2;
    out_of_bounds_kernel<<<1, 64>>>(out, kCount);
    (void)cudaDeviceSynchronize();
    (void)cudaFree(out);
    return 0;
}
