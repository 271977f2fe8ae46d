// linear_few.cu -- the linear layer for up to 32 tokens: every weight is read once and used at once.
//
//   out[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    as in linear.cu
// Rounding  docs/numerics.md section 2; a warp computes whole chunks, so no chain is ever cut
// Mapping   a thread block owns 16 or 32 weight rows, each of its warps every n-th chunk; weights are the
//           16-row operand, tokens the 8-column one. Weights pass through a ring in shared memory that
//           each warp fills for itself; chunk sums meet in shared memory and are added in order
// Cost      2 bytes per weight: memory-bound
// See       linear.cu, twin/linear.c, tests/kernels/test_bits_linear.py

#include "linear.cuh"

#include "../common/launch.cuh"
#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/tile.cuh"
#include "../common/vector.cuh"

constexpr int kFragmentRows = 16;   // weight rows of one instruction
constexpr int kFragmentTokens = 8;  // tokens of one instruction
constexpr int kStepsPerTile = kTileCols / NUMERICS_STEP;
constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;
constexpr int kStages = kTilesPerChunk;  // the ring holds one chunk: 16 KiB in flight per warp and 16 rows
constexpr int kMaxWarps = 8;             // 128 KiB of rings for 16 rows

// kTokenFragments x 8 tokens by kRowFragments x 16 weight rows per warp.
template <int kTokenFragments, int kRowFragments>
struct FewShape {
    static constexpr int kTokens = kTokenFragments * kFragmentTokens;
    static constexpr int kRows = kRowFragments * kFragmentRows;
    static constexpr int kWarps = kMaxWarps / kRowFragments;  // at most; fewer if there are fewer chunks
    static constexpr int kStageValues = kRows * kTileCols;
    static constexpr int kOutputs = kTokens * kRows;

    static size_t shared_bytes(int num_warps) {
        size_t ring = (size_t)num_warps * kStages * kStageValues * sizeof(bf16);
        size_t sums =
            (size_t)(num_warps + 1) * kOutputs * sizeof(float);  // one per warp and the running one
        return ring + sums;
    }
};

// Starts the copy of one stage: a strip of each group of eight rows, which are k_tiles strips apart.
template <typename Shape>
static __device__ __forceinline__ void fill_stage(uint32_t stage, const bf16 *strip, int k_tiles,
                                                  int lane) {
    constexpr int kChunks = Shape::kStageValues / kChunkValues;
    constexpr int kStripChunks = kStripValues / kChunkValues;
#pragma unroll
    for (int i = 0; i < kChunks / kWarp; ++i) {
        int chunk = i * kWarp + lane;
        const bf16 *from = strip + (size_t)(chunk / kStripChunks) * k_tiles * kStripValues;
        copy_async_16(stage + chunk * 16, from + chunk % kStripChunks * kChunkValues, 16);
    }
}

template <int kTokenFragments, int kRowFragments, bool kIsFloat>
static __global__ void __launch_bounds__(FewShape<kTokenFragments, kRowFragments>::kWarps *kWarp)
    linear_few_kernel(LinearProblem problem) {
    using Shape = FewShape<kTokenFragments, kRowFragments>;
    extern __shared__ __align__(128) unsigned char shared[];
    int num_warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int group = lane / 4, quad = lane % 4;
    int cols = problem.cols, k_tiles = num_tiles(cols);
    int num_chunks = (cols + NUMERICS_CHUNK - 1) / NUMERICS_CHUNK;
    int num_rounds = (num_chunks + num_warps - 1) / num_warps;
    int first_row = blockIdx.x * Shape::kRows;

    bf16 *rings = reinterpret_cast<bf16 *>(shared);
    float *sums = reinterpret_cast<float *>(rings + (size_t)num_warps * kStages * Shape::kStageValues);
    float *total = sums + num_warps * Shape::kOutputs;
    uint32_t ring = shared_address(rings + (size_t)warp * kStages * Shape::kStageValues);
    constexpr uint32_t kStageBytes = Shape::kStageValues * sizeof(bf16);
    const bf16 *band = problem.weight + (size_t)(first_row / kStripRows) * k_tiles * kStripValues;

    // The warp's k tiles in order: stage s of its life is tile s % 8 of its chunk number s / 8.
    auto k_tile_of = [&](int s) {
        return (warp + s / kTilesPerChunk * num_warps) * kTilesPerChunk + s % kTilesPerChunk;
    };
    auto fill = [&](int s) {
        int k_tile = k_tile_of(s);
        if (k_tile < k_tiles) {
            fill_stage<Shape>(ring + s % kStages * kStageBytes, band + (size_t)k_tile * kStripValues,
                              k_tiles, lane);
        }
        copy_async_commit();  // an empty group keeps the count
    };
    let_next_kernel_start();
    for (int s = 0; s < kStages; ++s) fill(s);  // weights change in no step
    wait_for_previous_kernel();

    for (int round = 0; round < num_rounds; ++round) {
        float acc[kRowFragments][kTokenFragments][4] = {};
        for (int i = 0; i < kTilesPerChunk; ++i) {
            int s = round * kTilesPerChunk + i, k = k_tile_of(s) * kTileCols;
            uint32_t tokens[kStepsPerTile][kTokenFragments][2];
#pragma unroll
            for (int step = 0; step < kStepsPerTile; ++step) {
#pragma unroll
                for (int f = 0; f < kTokenFragments; ++f) {
                    int token = f * kFragmentTokens + group, first_k = k + step * NUMERICS_STEP;
                    bool exists = token < problem.num_tokens && first_k < cols;
                    const bf16 *x = problem.x + (size_t)token * cols + first_k + 2 * quad;
                    tokens[step][f][0] = exists ? load_pair(x) : 0;
                    tokens[step][f][1] = exists ? load_pair(x + 8) : 0;
                }
            }
            copy_async_wait<kStages - 1>();
            __syncwarp();  // every lane's share of the stage has arrived
            uint32_t stage = ring + s % kStages * kStageBytes;
#pragma unroll
            for (int step = 0; step < kStepsPerTile; ++step) {
                if (k + step * NUMERICS_STEP >= cols) break;  // beyond K there is no step
#pragma unroll
                for (int r = 0; r < kRowFragments; ++r) {
                    uint32_t weights[4];
                    int row = r * kFragmentRows + lane % 16, chunk = 2 * step + lane / 16;
                    load_matrix_x4(weights, stage + tile_offset(row, chunk) * (int)sizeof(bf16));
#pragma unroll
                    for (int f = 0; f < kTokenFragments; ++f) {
                        mma_m16n8k16(acc[r][f], weights, tokens[step][f][0], tokens[step][f][1]);
                    }
                }
            }
            __syncwarp();  // every lane has read the stage before it is filled again
            fill(s + kStages);
        }

#pragma unroll
        for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
            for (int f = 0; f < kTokenFragments; ++f) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int row = r * kFragmentRows + group + e / 2 * 8,
                        token = f * kFragmentTokens + 2 * quad + e % 2;
                    sums[warp * Shape::kOutputs + token * Shape::kRows + row] = acc[r][f][e];
                }
            }
        }
        __syncthreads();  // the chunk sums of this round visible to the threads that add them
        int round_chunks = min(num_warps, num_chunks - round * num_warps);
        bool is_last = round == num_rounds - 1;
        for (int i = threadIdx.x; i < Shape::kOutputs; i += blockDim.x) {
            float sum = round == 0 ? sums[i] : __fadd_rn(total[i], sums[i]);
            for (int j = 1; j < round_chunks; ++j) sum = __fadd_rn(sum, sums[j * Shape::kOutputs + i]);
            total[i] = sum;
            int token = i / Shape::kRows, row = first_row + i % Shape::kRows;
            if (!is_last || token >= problem.num_tokens || row >= problem.rows) continue;
            size_t at = (size_t)token * problem.rows + row;
            if constexpr (kIsFloat) {
                static_cast<float *>(problem.out)[at] = sum;
            } else {
                static_cast<bf16 *>(problem.out)[at] = to_bf16(sum);
            }
        }
        __syncthreads();  // the chunk sums are read before the next round writes them
    }
}

template <int kTokenFragments, int kRowFragments, bool kIsFloat>
static Status launch(const LinearProblem &problem, cudaStream_t stream) {
    using Shape = FewShape<kTokenFragments, kRowFragments>;
    auto *kernel = linear_few_kernel<kTokenFragments, kRowFragments, kIsFloat>;
    int num_chunks = (problem.cols + NUMERICS_CHUNK - 1) / NUMERICS_CHUNK;
    int num_warps = num_chunks < Shape::kWarps ? num_chunks : Shape::kWarps;
    int num_blocks = (problem.rows + Shape::kRows - 1) / Shape::kRows;
    return launch_chained(kernel, dim3((unsigned)num_blocks), num_warps * kWarp,
                          Shape::shared_bytes(num_warps), 1, stream, problem);
}

template <bool kIsFloat>
static Status launch_by_tokens(const LinearProblem &problem, cudaStream_t stream) {
    if (problem.num_tokens <= 8) return launch<1, 1, kIsFloat>(problem, stream);
    if (problem.num_tokens <= 16) return launch<2, 1, kIsFloat>(problem, stream);
    return launch<4, 2, kIsFloat>(problem, stream);
}

Status launch_linear_few(const LinearProblem &problem, cudaStream_t stream) {
    if (problem.num_tokens > kFewTokens) {
        return fail(STATUS_INVALID_ARGUMENT, "num_tokens must be at most %d, got %d", kFewTokens,
                    problem.num_tokens);
    }
    return problem.is_float ? launch_by_tokens<true>(problem, stream)
                            : launch_by_tokens<false>(problem, stream);
}
