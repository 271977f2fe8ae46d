// linear_many.cu -- the linear layer for many tokens: tiles of 128 tokens by 128 weight rows.
//
//   out[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    as in linear.cu; in_features a multiple of 64: a step beyond K would turn -0 into +0
// Rounding  docs/numerics.md section 2; wgmma's steps are those of mma.sync, bit for bit. The accumulators
// are
//           added to the sums and restarted every 512 k's
// Mapping   a thread block per tile of outputs: one warpgroup fills a ring of k tiles in shared memory, two
//           multiply, 64 tokens x 128 rows each
// Cost      2 flops per token, row and k: bound by the tensor cores for some hundred tokens or more
// See       linear.cu, twin/linear.c, tests/kernels/test_bits_linear.py

#include "linear.cuh"

#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/tile.cuh"
#include "../common/vector.cuh"

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 40;  // per thread; 128 x 40 + 256 x 232 are the multiprocessor's 65536
constexpr int kConsumerRegisters = 232;
constexpr int kConsumerTokens = 64;  // rows of one wgmma
constexpr int kBlockTokens = kConsumers * kConsumerTokens;
constexpr int kBlockRows = 128;  // columns of one wgmma
constexpr int kAccumulators = kConsumerTokens * kBlockRows / kWarpgroup;
constexpr int kTokenTileBytes = kBlockTokens * kTileCols * (int)sizeof(bf16);
constexpr int kStripBytes = kStripValues * (int)sizeof(bf16);
constexpr int kStageBytes = kTokenTileBytes + kBlockRows / kStripRows * kStripBytes;
constexpr int kStages = 6;  // 192 KiB; one thread block per multiprocessor
constexpr int kCopiesInFlight =
    2;  // token tiles asked for, not yet handed over; on an H200 3 and 4 were slower
constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;
constexpr int kStepsPerTile = kTileCols / NUMERICS_STEP;
constexpr int kStepBytes = NUMERICS_STEP * (int)sizeof(bf16);
constexpr int kAlignment = 1024;  // of a swizzled tile
constexpr int kSharedBytes = kStages * kStageBytes + kAlignment;

// The ring's barriers: `full` counts the producer's 128 threads and the thread that asks for the weights;
// `empty` one thread of each consumer.
struct Barriers {
    uint64_t full[kStages];
    uint64_t empty[kStages];
};

// Which tile of the outputs this thread block computes.
struct BlockPlace {
    int first_token;
    int first_row;
    int k_tiles;
};

// Starts the copies of one k tile of the block's 128 tokens. Beyond the last token the last one is
// repeated, its outputs dropped.
static __device__ __forceinline__ void copy_tokens(uint32_t token_tile, const LinearProblem &problem,
                                                   const BlockPlace &place, int k_tile, int thread) {
    constexpr int kRowsAtOnce = kWarpgroup / kChunksPerRow;
    int chunk = thread % kChunksPerRow;
    const bf16 *x = problem.x + k_tile * kTileCols + chunk * kChunkValues;
#pragma unroll
    for (int pass = 0; pass < kBlockTokens / kRowsAtOnce; ++pass) {
        int row = pass * kRowsAtOnce + thread / kChunksPerRow;
        int token = min(place.first_token + row, problem.num_tokens - 1);
        copy_async_16(token_tile + tile_offset(row, chunk) * (int)sizeof(bf16),
                      x + (size_t)token * problem.cols, 16);
    }
}

// Starts the copies of the same k tile of the block's weight rows, a strip per lane; one whole warp.
static __device__ __forceinline__ void copy_weights(uint32_t weight_strips, uint32_t full,
                                                    const LinearProblem &problem, const BlockPlace &place,
                                                    int k_tile, int lane) {
    int first_strip = place.first_row / kStripRows;
    int count = min(kBlockRows, padded_rows(problem.rows) - place.first_row) / kStripRows;
    if (lane == 0) barrier_arrive_expect(full, count * kStripBytes);
    __syncwarp();  // the bytes are expected before the first arrive
    if (lane < count) {
        size_t strip = (size_t)(first_strip + lane) * place.k_tiles + k_tile;
        copy_bulk(weight_strips + lane * kStripBytes, problem.weight + strip * kStripValues, kStripBytes,
                  full);
    }
}

static __device__ __forceinline__ void produce(uint32_t ring, Barriers &barriers,
                                               const LinearProblem &problem, const BlockPlace &place,
                                               int thread) {
    // Hands the token tile over: complete for this thread, and visible to wgmma, which reads past the
    // caches.
    auto hand_over = [&](int k_tile) {
        fence_async_proxy();
        barrier_arrive(shared_address(&barriers.full[k_tile % kStages]));
    };
    for (int k_tile = 0; k_tile < place.k_tiles + kCopiesInFlight; ++k_tile) {
        if (k_tile < place.k_tiles) {
            int stage = k_tile % kStages;
            uint32_t at = ring + stage * kStageBytes;
            // The consumers have read what was here one turn of the ring ago; the first turn waits for
            // nobody.
            barrier_wait(shared_address(&barriers.empty[stage]), (k_tile / kStages + 1) % 2);
            if (thread < kWarp) {
                copy_weights(at + kTokenTileBytes, shared_address(&barriers.full[stage]), problem, place,
                             k_tile, thread);
            }
            copy_tokens(at, problem, place, k_tile, thread);
        }
        copy_async_commit();  // an empty group keeps the count
        if (k_tile >= kCopiesInFlight) {
            copy_async_wait<kCopiesInFlight>();
            hand_over(k_tile - kCopiesInFlight);
        }
    }
}

// Computes 64 tokens x 128 rows into `sum`.
static __device__ __forceinline__ void consume(float (&sum)[kAccumulators], uint32_t ring,
                                               Barriers &barriers, const LinearProblem &problem,
                                               const BlockPlace &place, int consumer, bool is_elected) {
    int stage = 0, parity = 0;
    for (int first_tile = 0; first_tile < place.k_tiles; first_tile += kTilesPerChunk) {
        float acc[kAccumulators];
        int count = min(kTilesPerChunk, place.k_tiles - first_tile), previous = 0;
        for (int i = 0; i < count; ++i) {
            barrier_wait(shared_address(&barriers.full[stage]), parity);
            uint32_t at = ring + stage * kStageBytes;
            uint64_t tokens =
                matrix_descriptor(at + consumer * kConsumerTokens * kTileCols * (int)sizeof(bf16));
            uint64_t weights = matrix_descriptor(at + kTokenTileBytes);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kStepsPerTile; ++step) {
                uint64_t offset = (uint64_t)(step * kStepBytes >> 4);
                wgmma_m64n128k16(acc, tokens + offset, weights + offset, i + step > 0);
            }
            wgmma_commit();
            wgmma_wait<1>();  // the previous tile is read: its stage may be filled again
            if (is_elected && i > 0) barrier_arrive(shared_address(&barriers.empty[previous]));
            previous = stage;
            stage = stage + 1 < kStages ? stage + 1 : 0;
            parity ^= stage == 0;
        }
        wgmma_wait<0>();
        if (is_elected) barrier_arrive(shared_address(&barriers.empty[previous]));
        // The first chunk's result is the sum; later ones are added.
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i)
            sum[i] = first_tile == 0 ? acc[i] : __fadd_rn(sum[i], acc[i]);
    }
}

template <bool kIsFloat>
static __device__ __forceinline__ void store_pair(const LinearProblem &problem, int token, int row,
                                                  float first, float second) {
    if (token >= problem.num_tokens || row >= problem.rows) return;
    size_t at = (size_t)token * problem.rows + row;
    bool is_pair = problem.rows % 2 == 0;  // then row + 1 exists, and the pair is aligned
    if constexpr (kIsFloat) {
        float *out = static_cast<float *>(problem.out) + at;
        if (is_pair) {
            *reinterpret_cast<float2 *>(out) = make_float2(first, second);
        } else {
            out[0] = first;
            if (row + 1 < problem.rows) out[1] = second;
        }
    } else {
        bf16 *out = static_cast<bf16 *>(problem.out) + at;
        if (is_pair) {
            *reinterpret_cast<uint32_t *>(out) = pack_bf16(first, second);
        } else {
            out[0] = to_bf16(first);
            if (row + 1 < problem.rows) out[1] = to_bf16(second);
        }
    }
}

template <bool kIsFloat>
static __global__ void __launch_bounds__(kThreads, 1) linear_many_kernel(LinearProblem problem) {
    extern __shared__ unsigned char shared[];
    __shared__ Barriers barriers;
    uint32_t ring = (shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
    int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
    BlockPlace place = {(int)blockIdx.y * kBlockTokens, (int)blockIdx.x * kBlockRows,
                        num_tiles(problem.cols)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared_address(&barriers.full[i]), kWarpgroup + 1);
            barrier_init(shared_address(&barriers.empty[i]), kConsumers);
        }
        barrier_init_fence();
    }
    __syncthreads();  // the barriers are initialised before anyone arrives or waits
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        produce(ring, barriers, problem, place, thread);
    } else {
        take_registers<kConsumerRegisters>();
        float sum[kAccumulators];
        int consumer = warpgroup - 1, lane = thread % kWarp, group = lane / 4, quad = lane % 4;
        consume(sum, ring, barriers, problem, place, consumer, thread == 0);
        int token = place.first_token + consumer * kConsumerTokens + thread / kWarp * 16 + group;
#pragma unroll
        for (int i = 0; i < kAccumulators / 4; ++i) {
            int row = place.first_row + 8 * i + 2 * quad;
            store_pair<kIsFloat>(problem, token, row, sum[4 * i], sum[4 * i + 1]);
            store_pair<kIsFloat>(problem, token + 8, row, sum[4 * i + 2], sum[4 * i + 3]);
        }
    }
}

template <bool kIsFloat>
static Status launch(const LinearProblem &problem, cudaStream_t stream) {
    auto *kernel = linear_many_kernel<kIsFloat>;
    dim3 grid((problem.rows + kBlockRows - 1) / kBlockRows,
              (problem.num_tokens + kBlockTokens - 1) / kBlockTokens);
    TRY(CUDA_STATUS(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)));
    kernel<<<grid, kThreads, kSharedBytes, stream>>>(problem);
    return CUDA_STATUS(cudaGetLastError());
}

Status launch_linear_many(const LinearProblem &problem, cudaStream_t stream) {
    if (problem.cols % kTileCols != 0) {
        return fail(STATUS_INVALID_ARGUMENT, "in_features must be a multiple of %d, got %d", kTileCols,
                    problem.cols);
    }
    return problem.is_float ? launch<true>(problem, stream) : launch<false>(problem, stream);
}
