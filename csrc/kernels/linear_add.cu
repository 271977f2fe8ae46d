// linear_add.cu -- a linear layer for many tokens, added to the residual stream.
//
//   out[t, n] = bf16(residual[t, n] + bf16(sum_k x[t, k] weight[n, k]))
//
// Shapes    x [num_tokens, in_features] bf16, in_features a multiple of 64; weight packed; residual, out
//           [num_tokens, out_features], out_features a multiple of 8; out may be residual
// Rounding  those of linear.cu and residual_add.cu, one after the other
// Mapping   linear_many.cuh, or linear_split.cuh for few tiles; a warp adds its 16 tokens' rows 16 bytes at
// a time Cost      2 flops per token, row and k: bound by the tensor cores See       linear.cu,
// residual_add.cu, tests/kernels/test_bits_fused_linear.py

#include "linear_split.cuh"

struct AddSums {
    static constexpr int kParts = 1;
    static constexpr int kUnits = kWarpTokens * kRowChunks / kWarp;
    bf16 *out;
    const bf16 *residual;
    int rows;

    __device__ __forceinline__ PartPlace part(int row_tile, int) const {
        return {0, row_tile * kBlockRows};
    }

    __device__ __forceinline__ bool take(const float (&sum)[kSums], const WarpTile &tile) const {
        stage_sums(sum, tile);
        return true;
    }

    __device__ __forceinline__ void write(int unit, const WarpTile &tile) const {
        int index = unit * kWarp + tile.lane, place = index / kRowChunks, chunk = index % kRowChunks;
        add(tile, place, chunk, tile.row_tile * kBlockRows + chunk * kChunkValues);
    }

    // Half a tile's rows; row_tile counts halves.
    __device__ __forceinline__ void finish_half(const float (&sum)[kHalfSums], const WarpTile &tile) const {
        __syncwarp();  // every lane has read what is about to be staged over
        stage_sums(sum, tile);
        __syncwarp();  // every lane's sums are staged
#pragma unroll
        for (int unit = 0; unit < kHalfUnits; ++unit) {
            int index = unit * kWarp + tile.lane, place = index / kHalfChunks, chunk = index % kHalfChunks;
            add(tile, place, chunk, tile.row_tile * kHalfRows + chunk * kChunkValues);
        }
    }

    __device__ __forceinline__ void add(const WarpTile &tile, int place, int chunk, int row) const {
        int token = tile.first_token + place;
        if (token >= tile.num_tokens || row >= rows) return;
        size_t at = (size_t)token * rows + row;
        float x[kVector], y[kVector];
        unpack(x, load_vector(residual + at));
        unpack(y, *staged(tile, place, chunk));
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = __fadd_rn(x[i], y[i]);
        store_vector(out + at, pack(x));
    }
};

extern "C" Status cuda_linear_add(bf16 *out, const bf16 *x, const Matrix *weight, const bf16 *residual,
                                  int num_tokens, Stream stream) {
    if (num_tokens == 0) return STATUS_OK;
    ManyOperands operands = {x, num_tokens, {weight}, 1};
    AddSums operation = {out, residual, weight->rows};
    ManyMaps maps = {};
    ManyTiles tiles;
    int num_multiprocessors;
    TRY(prepare_many(&maps, &tiles, &num_multiprocessors, operands, AddSums::kParts));
    if (splits(tiles, num_multiprocessors))
        return launch_split(operation, maps, tiles, (cudaStream_t)stream);
    return launch_tiles(operation, maps, tiles, num_multiprocessors, (cudaStream_t)stream);
}
