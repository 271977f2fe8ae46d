// attention_decode.cu -- attention for sequences whose query rows fit one instruction: keys are shared out.
//
//   out[row] = fold of segments, ascending, of folds of tiles, ascending
//
// Shapes    as in attention.cu; at most 16 rows (new tokens x heads of the group) per sequence and kv head
// Rounding  docs/numerics.md section 4
// Mapping   a cluster of thread blocks per (sequence, kv head). Block i of n takes segments i, i + n, ..;
// its
//           four warps take the tiles of a segment in two rounds, the block folds them in order, and at the
//           end the cluster folds the segments in order, reading each other's shared memory
// Cost      256 bytes per key and kv head: memory-bound
// See       attention.cu, twin/attention.c, tests/kernels/test_bits_attention.py

#include <cooperative_groups.h>

#include "attention.cuh"

namespace cg = cooperative_groups;

constexpr int kWarps = 4;  // 128 KiB of tiles in flight per thread block
constexpr int kThreads = kWarps * kWarp;
constexpr int kRounds = NUMERICS_SEGMENT / kWarps;
constexpr int kMaxCluster = 8;  // the largest portable size

// A partial result of one row in shared memory: 64 values, then maximum and sum. The stride of 72 floats
// puts the two-float stores of a half warp into 32 different banks.
constexpr int kPartialStride = 72;
constexpr int kMaxColumn = kHeadDim;
constexpr int kSumColumn = kHeadDim + 1;
constexpr int kPartialFloats = kFragmentRows * kPartialStride;
constexpr int kValuesPerThread = kFragmentRows * kHeadDim / kThreads;
constexpr int kThreadsPerRow = kHeadDim / kValuesPerThread;

constexpr int kTileBytes = kWarps * 2 * kKvTileBytes;
constexpr int kMaxSharedBytes = 227 * 1024;  // of a thread block on compute capability 9.0
constexpr int kPartialBytes = kPartialFloats * (int)sizeof(float);
constexpr int kMaxSegmentsPerBlock =
    (kMaxSharedBytes - kTileBytes - kWarps * kPartialBytes) / kPartialBytes;

int decode_max_seq_len(void) {
    return kMaxSegmentsPerBlock * kMaxCluster * kSegmentKeys;
}

// The part of a row that one thread folds: eight columns, and the row's maximum and sum.
struct RowPart {
    float max;
    float sum;
    float values[kValuesPerThread];
};

static __device__ __forceinline__ void load_part(RowPart &part, const float *row, int first_column) {
    part.max = row[kMaxColumn];
    part.sum = row[kSumColumn];
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) part.values[i] = row[first_column + i];
}

static __device__ __forceinline__ void store_part(float *row, const RowPart &part, int first_column) {
    if (first_column == 0) {
        row[kMaxColumn] = part.max;
        row[kSumColumn] = part.sum;
    }
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) row[first_column + i] = part.values[i];
}

static __device__ __forceinline__ void fold_part(RowPart &part, const RowPart &next) {
    FoldFactors factors = fold_sums(part.max, part.sum, next.max, next.sum);
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) {
        part.values[i] = fold_value(part.values[i], next.values[i], factors);
    }
}

static __device__ __forceinline__ void store_state(float *partial, const RowState &state, int lane) {
    int group = lane / 4, quad = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float *row = partial + (group + 8 * half) * kPartialStride;
        if (quad == 0) {
            row[kMaxColumn] = state.max[half];
            row[kSumColumn] = state.sum[half];
        }
#pragma unroll
        for (int f = 0; f < kDimFragments; ++f) {
            *reinterpret_cast<float2 *>(row + f * 8 + 2 * quad) =
                make_float2(state.out[f][2 * half], state.out[f][2 * half + 1]);
        }
    }
}

static __global__ void __launch_bounds__(kThreads, 1) attention_decode_kernel(AttentionProblem problem) {
    extern __shared__ __align__(128) unsigned char shared[];
    cg::cluster_group cluster = cg::this_cluster();
    Sequence sequence(problem, blockIdx.z);
    if (!fits_decode(sequence.num_new, problem.group_size) || sequence.num_new == 0)
        return;  // the whole cluster
    int kv_head = blockIdx.y, num_ranks = gridDim.x, rank = blockIdx.x;
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int num_rows = sequence.num_rows(problem.group_size);
    int num_tiles_in_use = (sequence.len + kTileKeys - 1) / kTileKeys;
    int num_segments = (sequence.len + kSegmentKeys - 1) / kSegmentKeys;
    int num_own = num_segments > rank ? (num_segments - rank + num_ranks - 1) / num_ranks : 0;

    uint32_t k_tile = shared_address(shared) + warp * 2 * kKvTileBytes, v_tile = k_tile + kKvTileBytes;
    float *tile_partials = reinterpret_cast<float *>(shared + kTileBytes);
    float *segment_partials = tile_partials + kWarps * kPartialFloats;

    // The warp's tiles in order: step s of its life is round s % 2 of its block's segment number s / 2.
    auto tile_of = [&](int step) {
        return (rank + step / kRounds * num_ranks) * NUMERICS_SEGMENT + step % kRounds * kWarps + warp;
    };
    auto fill = [&](int step) {
        int tile = tile_of(step);
        if (tile < num_tiles_in_use) {
            fill_kv_tile<kWarp>(k_tile, v_tile, problem.cache, sequence, kv_head, tile, lane);
        }
        copy_async_commit();
    };

    uint32_t query[kQuerySteps][4];
    load_query(query, problem, sequence, kv_head, 0, lane);
    int positions[2];  // of the two rows this lane holds
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        positions[half] = sequence.position(min(lane / 4 + 8 * half, num_rows - 1), problem.group_size);
    }
    int fold_row = threadIdx.x / kThreadsPerRow,
        fold_column = threadIdx.x % kThreadsPerRow * kValuesPerThread;
    int fold_position = sequence.position(min(fold_row, num_rows - 1), problem.group_size);

    RowPart segment = {};
    fill(0);
    for (int step = 0; step < num_own * kRounds; ++step) {
        int tile = tile_of(step);
        copy_async_wait<0>();
        __syncwarp();  // every lane's share of the tile has arrived
        if (tile < num_tiles_in_use) {
            RowState state;
            int visible[2] = {positions[0] + 1 - tile * kTileKeys, positions[1] + 1 - tile * kTileKeys};
            attend_tile(state, query, k_tile, v_tile, visible, problem.scale, lane);
            store_state(tile_partials + warp * kPartialFloats, state, lane);
        }
        __syncwarp();  // every lane has read the tile before it is filled again
        fill(step + 1);
        __syncthreads();  // the round's tiles visible to the threads that fold them
        int first_tile = tile - warp, round = step % kRounds;
        for (int i = 0; i < kWarps; ++i) {
            if ((first_tile + i) * kTileKeys > fold_position) break;  // wholly beyond this row
            RowPart part;
            load_part(part, tile_partials + i * kPartialFloats + fold_row * kPartialStride, fold_column);
            if (round == 0 && i == 0) {
                segment = part;
            } else {
                fold_part(segment, part);
            }
        }
        if (round == kRounds - 1) {
            float *partial = segment_partials + step / kRounds * kPartialFloats;
            store_part(partial + fold_row * kPartialStride, segment, fold_column);
        }
        __syncthreads();  // the round's tiles are read before the next round writes them
    }
    copy_async_wait<0>();  // nothing may arrive after this block's shared memory is given back
    cluster.sync();        // every block's segments visible to the cluster

    // The cluster's threads share out the row parts.
    int part_index = rank * kThreads + (int)threadIdx.x;
    for (; part_index < num_rows * kThreadsPerRow; part_index += num_ranks * kThreads) {
        int row = part_index / kThreadsPerRow, column = part_index % kThreadsPerRow * kValuesPerThread;
        int position = sequence.position(row, problem.group_size);
        RowPart result = {};
        for (int i = 0; i < num_segments && i * kSegmentKeys <= position; ++i) {
            const float *own = segment_partials + i / num_ranks * kPartialFloats + row * kPartialStride;
            RowPart part;
            load_part(part, cluster.map_shared_rank(own, i % num_ranks), column);
            if (i == 0) {
                result = part;
            } else {
                fold_part(result, part);
            }
        }
        float inverse = __frcp_rn(result.sum);
#pragma unroll
        for (int i = 0; i < kValuesPerThread; ++i) result.values[i] = __fmul_rn(result.values[i], inverse);
        int token = sequence.first_token + row / problem.group_size;
        int head = kv_head * problem.group_size + row % problem.group_size;
        store_vector(problem.out + ((size_t)token * problem.num_heads + head) * kHeadDim + column,
                     pack(result.values));
    }
    cluster.sync();  // no block leaves while another still reads its shared memory
}

Status launch_attention_decode(const AttentionProblem &problem, cudaStream_t stream) {
    int num_segments = (problem.max_seq_len + kSegmentKeys - 1) / kSegmentKeys;
    int cluster_size = 1;
    while (cluster_size < kMaxCluster && cluster_size < num_segments) cluster_size *= 2;
    int segments_per_block = (num_segments + cluster_size - 1) / cluster_size;
    size_t shared_bytes = kTileBytes + (size_t)(kWarps + segments_per_block) * kPartialBytes;
    TRY(CUDA_STATUS(cudaFuncSetAttribute(attention_decode_kernel,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes)));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)cluster_size;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3((unsigned)cluster_size, (unsigned)problem.cache.num_kv_heads, (unsigned)problem.num_seqs);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return CUDA_STATUS(cudaLaunchKernelEx(&config, attention_decode_kernel, problem));
}
