// no_cuda.c -- stands in for the CUDA table where the library was built without nvcc.

#include "kernels.h"

Status cuda_kernels(const Kernels **kernels) {
    *kernels = NULL;
    return fail(STATUS_UNAVAILABLE, "device cuda: this library was built without CUDA (no nvcc was found)");
}
