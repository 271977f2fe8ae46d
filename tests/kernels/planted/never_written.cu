// never_written.cu -- planted: a kernel adds up memory of which one half was never written. initcheck must
// say so.

#include <cuda_runtime.h>

static __global__ void never_written_kernel(int *out, const int *values) {
    out[threadIdx.x] = values[threadIdx.x] + 1;
}

int main(void) {
    int *out, *values;
    if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 2;
    if (cudaMalloc(&values, 64 * sizeof(int)) != cudaSuccess) return 2;
    if (cudaMemset(values, 0, 32 * sizeof(int)) != cudaSuccess) return 2;  // the fault: half of it
    never_written_kernel<<<1, 64>>>(out, values);
    if (cudaDeviceSynchronize() != cudaSuccess) return 2;
    (void)cudaFree(values);
    (void)cudaFree(out);
    return 0;
}
