// read_bandwidth.cu -- what the card reads from device memory: 4 GiB, every byte once, by bulk copies.
//
// Prints bytes per second, the median of eleven passes timed by events. One thread block per multiprocessor
// keeps four copies of 16 KiB on their way into its shared memory; a word of each piece is added up, so
// that nothing can be left out. The limit that benchmarks are shares of.

#include <cuda_runtime.h>
#include <stdio.h>
#include <algorithm>
#include <vector>
#include "ptx.cuh"

constexpr int kStages = 4, kPieceBytes = 16384;
constexpr size_t kBytes = (size_t)4 << 30;

static __global__ void read_kernel(unsigned *sum, const unsigned char *data, size_t pieces) {
    extern __shared__ __align__(128) unsigned char ring[];
    __shared__ uint64_t full[kStages];
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kStages; ++i) barrier_init(shared_address(&full[i]), 1);
    barrier_init_fence();
    auto ask = [&](size_t turn) {
        size_t piece = blockIdx.x + turn * gridDim.x;
        if (piece >= pieces) return;
        uint32_t barrier = shared_address(&full[turn % kStages]);
        barrier_arrive_expect(barrier, kPieceBytes);
        copy_bulk(shared_address(ring + turn % kStages * kPieceBytes), data + piece * kPieceBytes,
                  kPieceBytes, barrier);
    };
    for (size_t turn = 0; turn < kStages; ++turn) ask(turn);
    unsigned total = 0;
    for (size_t turn = 0; blockIdx.x + turn * gridDim.x < pieces; ++turn) {
        barrier_wait(shared_address(&full[turn % kStages]), (int)(turn / kStages & 1));
        total += *reinterpret_cast<volatile unsigned *>(ring + turn % kStages * kPieceBytes);
        ask(turn + kStages);
    }
    if (total == 1) *sum = total;
}

int main(void) {
    int blocks = 0;
    unsigned char *data;
    unsigned *sum;
    cudaEvent_t begin, end;
    if (cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0) != cudaSuccess) return 2;
    if (cudaMalloc(&data, kBytes) != cudaSuccess || cudaMalloc(&sum, 4) != cudaSuccess) return 2;
    if (cudaMemset(data, 0x5a, kBytes) != cudaSuccess) return 2;
    if (cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kStages * kPieceBytes) != cudaSuccess)
        return 2;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    std::vector<float> times;
    for (int pass = 0; pass < 12; ++pass) {
        cudaEventRecord(begin);
        read_kernel<<<blocks, 32, kStages * kPieceBytes>>>(sum, data, kBytes / kPieceBytes);
        cudaEventRecord(end);
        if (cudaEventSynchronize(end) != cudaSuccess) return 2;
        float ms = 0;
        cudaEventElapsedTime(&ms, begin, end);
        if (pass > 0) times.push_back(ms);  // the first is warm-up
    }
    std::sort(times.begin(), times.end());
    printf("%.6e\n", (double)kBytes / (times[times.size() / 2] * 1e-3));
    cudaFree(data);
    cudaFree(sum);
    return 0;
}
