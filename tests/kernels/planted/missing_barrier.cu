// missing_barrier.cu -- planted: a warp reads what another wrote to shared memory, with no barrier between.
// racecheck must say so.

#include <cuda_runtime.h>

static __global__ void missing_barrier_kernel(int *out) {
    __shared__ int values[64];
    int i = (int)threadIdx.x;
    values[i] = i;
    out[i] = values[63 - i];  // the fault: no __syncthreads() before it
}

int main(void) {
    int *out;
    if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 2;
    missing_barrier_kernel<<<1, 64>>>(out);
    if (cudaDeviceSynchronize() != cudaSuccess) return 2;
    (void)cudaFree(out);
    return 0;
}
