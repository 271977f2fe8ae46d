// fake_cuda.c -- a CUDA runtime without a device: memory is the host's, copies copy, kernels do nothing.
//
// The linker takes it in the place of NVIDIA's runtime library, under the real launchers, so every CUDA call
// of the engine can fail, once or from then on, on a machine without a GPU (tests/runtime/test_cuda_faults.py).
// A call of the runtime that is not here does not link: its failure would be tested by nobody.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static long calls;    // that could fail, since cuda_faults_arm
static long fail_at;  // the call that fails, from 1; 0: none
static int is_sticky; // every later call fails too, as after a fault on a real device
static cudaError_t error_code;
static cudaError_t last_error;
static long live;  // device allocations, streams and graphs given out and not yet back
static const char *failed_call = "";
static int filling;  // every byte of new memory
static int driver_version = 13000;

EXPORT void cuda_faults_arm(long n, int code, int sticky) {
    calls = 0;
    fail_at = n;
    error_code = (cudaError_t)code;
    is_sticky = sticky;
    last_error = cudaSuccess;
    failed_call = "";
}
EXPORT void cuda_faults_fill(int value) {
    filling = value;
}
EXPORT void cuda_faults_driver(int version) {
    driver_version = version;
}
EXPORT long cuda_faults_calls(void) {
    return calls;
}
EXPORT long cuda_faults_live(void) {
    return live;
}
EXPORT const char *cuda_faults_failed(void) {
    return failed_call;
}

// Counts the call; its error if this is the one.
static cudaError_t outcome(const char *name) {
    ++calls;
    if (fail_at == 0 || calls < fail_at || (calls > fail_at && !is_sticky)) return cudaSuccess;
    if (calls == fail_at) failed_call = name;
    last_error = error_code;
    return error_code;
}
#define MAY_FAIL()                                  \
    do {                                            \
        cudaError_t error = outcome(__func__);      \
        if (error != cudaSuccess) return error;     \
    } while (0)

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    if (!is_sticky) last_error = cudaSuccess;
    return error;
}
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "made to fail";
}

// --- the device

cudaError_t cudaGetDeviceCount(int *count) {
    MAY_FAIL();
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    MAY_FAIL();
    *version = driver_version;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    MAY_FAIL();
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    (void)device;
    MAY_FAIL();
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "no device");
    properties->major = 9;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    (void)device;
    MAY_FAIL();
    *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int *count, const void *function,
                                           const cudaLaunchConfig_t *config) {
    (void)function, (void)config;
    MAY_FAIL();
    *count = 16;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    MAY_FAIL();
    *free_bytes = (size_t)1 << 30;
    *total_bytes = (size_t)2 << 30;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    (void)function, (void)attribute, (void)value;
    MAY_FAIL();
    return cudaSuccess;
}

// A tensor map that names nothing.
static CUresult encode_tiled(CUtensorMap *map) {
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
    (void)version, (void)flags;
    MAY_FAIL();
    if (strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorUnknown;
    *function = (void *)encode_tiled;
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// --- memory

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    MAY_FAIL();
    bytes = (bytes + 255) / 256 * 256;
    *memory = aligned_alloc(256, bytes);
    if (!*memory) return cudaErrorMemoryAllocation;
    memset(*memory, filling, bytes);
    ++live;
    return cudaSuccess;
}
// Gives the memory back and may fail all the same: a destructor cannot do more than ask.
cudaError_t cudaFree(void *memory) {
    if (memory) --live;
    free(memory);
    return outcome(__func__);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    (void)kind, (void)stream;
    MAY_FAIL();
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    (void)stream;
    MAY_FAIL();
    memset(to, value, bytes);
    return cudaSuccess;
}

// --- streams

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    (void)flags;
    MAY_FAIL();
    *stream = (cudaStream_t)malloc(1);
    ++live;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (stream) --live;
    free(stream);
    return outcome(__func__);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    (void)stream;
    MAY_FAIL();
    return cudaSuccess;
}

// --- launches, which compute nothing

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    (void)config, (void)function, (void)arguments;
    MAY_FAIL();
    return cudaSuccess;
}

// --- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    (void)stream, (void)mode;
    MAY_FAIL();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    (void)stream;
    *graph = NULL;
    MAY_FAIL();
    *graph = (cudaGraph_t)malloc(1);
    ++live;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph,
                                 unsigned long long flags) {
    (void)graph, (void)flags;
    MAY_FAIL();
    *executable = (cudaGraphExec_t)malloc(1);
    ++live;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    (void)executable, (void)stream;
    MAY_FAIL();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    if (graph) --live;
    free(graph);
    return outcome(__func__);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    if (executable) --live;
    free(executable);
    return outcome(__func__);
}

// What nvcc makes of <<<...>>> and of each file of kernels.
typedef struct CUkern_st *Kernel;
cudaError_t __cudaGetKernel(Kernel *kernel, const void *function) {
    *kernel = (Kernel)(void *)function;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(Kernel kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                               cudaStream_t stream) {
    (void)kernel, (void)grid, (void)block, (void)arguments, (void)shared_bytes, (void)stream;
    MAY_FAIL();  // nobody looks at this: the launcher asks for the last error
    return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream) {
    (void)grid, (void)block, (void)shared_bytes, (void)stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    memset(grid, 0, sizeof *grid);
    memset(block, 0, sizeof *block);
    *shared_bytes = 0;
    memset(stream, 0, sizeof(void *));
    return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) {
    return (void **)binary;
}
void __cudaRegisterFatBinaryEnd(void **handle) {
    (void)handle;
}
void __cudaUnregisterFatBinary(void **handle) {
    (void)handle;
}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int threads,
                            void *thread, void *block, void *block_size, void *grid_size, int *warps) {
    (void)handle, (void)host, (void)device, (void)name, (void)threads;
    (void)thread, (void)block, (void)block_size, (void)grid_size, (void)warps;
}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                       int constant, int global) {
    (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant,
        (void)global;
}
