// launch.cuh -- a kernel's launch, chained to the one before it (programmatic dependent launch).
//
// Such a kernel calls wait_for_previous_kernel() before it reads or writes anything that a step changes,
// and let_next_kernel_start() when the next one's blocks may take the places that are free.

#pragma once
#include "cuda_status.h"

// A launch that may begin while the previous kernel of the stream ends.
template <typename... Parameters, typename... Arguments>
Status launch_chained(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                      int cluster_size, cudaStream_t stream, const Arguments &...arguments) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {(unsigned)cluster_size, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster_size > 1 ? 2 : 1;
    if (shared_bytes > 48 * 1024)
        TRY(CUDA_STATUS(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)shared_bytes)));
    return CUDA_STATUS(cudaLaunchKernelEx(&config, kernel, arguments...));
}
