// device.cu -- the CUDA device: its stream, its memory, and copies between it and the host.
//
// Mapping   a Stream is a cudaStream_t; work on it runs in order. copy_in returns when the host's data may
//           change, copy_out when it is there
// See       twin/threads.c

#include "../common/cuda_status.h"
extern "C" {
#include "kernels.h"
}

// The instructions the kernels are written in, and the bits of its tensor cores, are this architecture's.
constexpr int kComputeCapabilityMajor = 9;
constexpr int kComputeCapabilityMinor = 0;

// Why there is no device. To the runtime a driver that is too old and none at all are one error; none has
// version 0.
static const char *absence(cudaError_t error) {
    int version = 0;
    if (error == cudaSuccess) return "the driver reports none";
    if (error != cudaErrorInsufficientDriver || cudaDriverGetVersion(&version) != cudaSuccess ||
        version > 0)
        return cudaGetErrorString(error);
    return "no NVIDIA driver was found";
}

static Status check_device(void) {
    int num_devices = 0;
    cudaError_t error = cudaGetDeviceCount(&num_devices);
    if (error != cudaSuccess || num_devices == 0) {
        (void)cudaGetLastError();  // not the fault of the next call
        return fail(STATUS_UNAVAILABLE, "no CUDA device: %s", absence(error));
    }
    int device = 0;
    cudaDeviceProp properties;
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    TRY(CUDA_STATUS(cudaGetDeviceProperties(&properties, device)));
    if (properties.major != kComputeCapabilityMajor || properties.minor != kComputeCapabilityMinor) {
        return fail(STATUS_UNAVAILABLE, "the CUDA kernels need compute capability %d.%d, %s has %d.%d",
                    kComputeCapabilityMajor, kComputeCapabilityMinor, properties.name, properties.major,
                    properties.minor);
    }
    return STATUS_OK;
}

extern "C" Status cuda_open_stream(Stream *stream, int num_threads) {
    (void)num_threads;  // the twin's concern
    TRY(check_device());
    cudaStream_t opened;
    TRY(CUDA_STATUS(cudaStreamCreateWithFlags(&opened, cudaStreamNonBlocking)));
    *stream = (Stream)opened;
    return STATUS_OK;
}

extern "C" void cuda_close_stream(Stream stream) {
    if (stream != nullptr) (void)cudaStreamDestroy((cudaStream_t)stream);
}

extern "C" Status cuda_alloc(void **memory, size_t bytes, Stream stream) {
    (void)stream;
    cudaError_t error = cudaMalloc(memory, bytes > 0 ? bytes : 1);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        size_t free_bytes = 0, total_bytes = 0;
        TRY(CUDA_STATUS(cudaMemGetInfo(&free_bytes, &total_bytes)));
        return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of device memory asked, %zu of %zu free", bytes,
                    free_bytes, total_bytes);
    }
    return cuda_status(error, __FILE__, __LINE__, "cudaMalloc");
}

extern "C" void cuda_free(void *memory, Stream stream) {
    (void)stream;
    (void)cudaFree(memory);  // waits for the device, so nothing still reads it
}

extern "C" Status cuda_copy_in(void *to, const void *from_host, size_t bytes, Stream stream) {
    return CUDA_STATUS(cudaMemcpyAsync(to, from_host, bytes, cudaMemcpyHostToDevice, (cudaStream_t)stream));
}

extern "C" Status cuda_copy_out(void *to_host, const void *from, size_t bytes, Stream stream) {
    TRY(CUDA_STATUS(cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, (cudaStream_t)stream)));
    return CUDA_STATUS(cudaStreamSynchronize((cudaStream_t)stream));
}

extern "C" Status cuda_synchronize(Stream stream) {
    return CUDA_STATUS(cudaStreamSynchronize((cudaStream_t)stream));
}

extern "C" Status cuda_free_memory(int64_t *bytes, Stream stream) {
    (void)stream;
    size_t free_bytes = 0, total_bytes = 0;
    TRY(CUDA_STATUS(cudaMemGetInfo(&free_bytes, &total_bytes)));
    *bytes = (int64_t)free_bytes;
    return STATUS_OK;
}
