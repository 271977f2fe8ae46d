// linear_many.cu -- the linear layer for many tokens.
//
//   out[t, n] = bf16(sum_k x[t, k] weight[n, k])          (logits: float32, unrounded)
//
// Shapes    as in linear.cu; in_features a multiple of 64: a step beyond K would turn -0 into +0
// Rounding  docs/numerics.md section 2; wgmma's steps are those of mma.sync, bit for bit. The accumulators
//           are added to the sums and restarted every 512 k's
// Mapping   linear_many.cuh: tiles of 128 tokens by 128 rows, two warpgroups of 64 tokens
// Cost      2 flops per token, row and k: bound by the tensor cores for some hundred tokens or more
// See       linear.cu, linear_add.cu, gated_linear.cu, twin/linear.c, tests/kernels/test_bits_linear.py

#include "linear.cuh"
#include "linear_many.cuh"

template <bool kIsFloat>
struct StoreSums {
    static constexpr int kParts = 1;
    static constexpr int kUnits = kWarpTokens * kRowChunks / kWarp;
    using Fetched = Nothing;
    void *out;  // [num_tokens, rows]
    int rows;

    __device__ __forceinline__ PartPlace part(int row_tile, int) const {
        return {0, row_tile * kBlockRows};
    }

    // Rows of any number: a pair of columns at a time, straight from the fragments.
    __device__ __forceinline__ void store_pairs(const float (&sum)[kSums], const WarpTile &tile) const {
        bool is_pair = rows % 2 == 0;  // then row + 1 exists, and the pair is aligned
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i) {
            int token = tile.first_token + tile.lane / 4 + 8 * (i % 2);
            int row = tile.row_tile * kBlockRows + i / 2 * 8 + 2 * (tile.lane % 4);
            if (token >= tile.num_tokens || row >= rows) continue;
            size_t at = (size_t)token * rows + row;
            float first = sum[2 * i], second = sum[2 * i + 1];
            if constexpr (kIsFloat) {
                float *to = static_cast<float *>(out) + at;
                if (is_pair) {
                    *reinterpret_cast<float2 *>(to) = make_float2(first, second);
                } else {
                    to[0] = first;
                    if (row + 1 < rows) to[1] = second;
                }
            } else {
                bf16 *to = static_cast<bf16 *>(out) + at;
                if (is_pair) {
                    *reinterpret_cast<uint32_t *>(to) = pack_bf16(first, second);
                } else {
                    to[0] = to_bf16(first);
                    if (row + 1 < rows) to[1] = to_bf16(second);
                }
            }
        }
    }

    __device__ __forceinline__ bool take(const float (&sum)[kSums], const WarpTile &tile) const {
        bool is_staged = !kIsFloat && rows % kChunkValues == 0;
        if (is_staged) {
            stage_sums(sum, tile);
        } else {
            store_pairs(sum, tile);
        }
        return is_staged;
    }

    __device__ __forceinline__ Fetched fetch(int, const WarpTile &) const { return {}; }

    __device__ __forceinline__ void write(int unit, const WarpTile &tile, const Fetched &) const {
        UnitPlace place(unit, tile);
        if (place.exists(tile, rows))
            store_vector(static_cast<bf16 *>(out) + place.offset(rows),
                         *tile.staged(place.place, place.chunk));
    }
};

template <bool kIsFloat>
static Status launch(const LinearProblem &problem, cudaStream_t stream) {
    Matrix weight = {const_cast<bf16 *>(problem.weight), problem.rows, problem.cols};
    ManyOperands operands = {problem.x, problem.num_tokens, {&weight}, 1};
    return launch_many(StoreSums<kIsFloat>{problem.out, problem.rows}, operands, stream);
}

Status launch_linear_many(const LinearProblem &problem, cudaStream_t stream) {
    if (problem.cols % kTileCols != 0) {
        return fail(STATUS_INVALID_ARGUMENT, "in_features must be a multiple of %d, got %d", kTileCols,
                    problem.cols);
    }
    return problem.is_float ? launch<true>(problem, stream) : launch<false>(problem, stream);
}
