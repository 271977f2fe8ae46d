// cuda_status.h -- the CUDA runtime's errors as this project's Status, and our Stream as CUDA's.

#pragma once
#include <cuda_runtime.h>
extern "C" {
#include "status.h"
}

// What a failed runtime call means to the caller; also clears the runtime's own memory of it, so that the
// next launch is not blamed.
inline Status cuda_status(cudaError_t error, const char *file, int line, const char *call) {
    if (error == cudaSuccess) return STATUS_OK;
    (void)cudaGetLastError();
    switch (error) {
        case cudaErrorMemoryAllocation:
            return fail(STATUS_OUT_OF_MEMORY, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
        case cudaErrorNoDevice:
        case cudaErrorInsufficientDriver:
        case cudaErrorInitializationError:
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorDevicesUnavailable:
            return fail(STATUS_UNAVAILABLE, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
        default:
            return fail(STATUS_DEVICE_ERROR, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
    }
}

// A CUDA call's outcome as a Status that names the call. One of the project's two macros.
#define CUDA_STATUS(call) cuda_status((call), __FILE__, __LINE__, #call)
