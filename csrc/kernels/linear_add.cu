// linear_add.cu -- a linear layer for many tokens, added to the residual stream.
//
//   out[t, n] = bf16(residual[t, n] + bf16(sum_k x[t, k] weight[n, k]))
//
// Shapes    x [num_tokens, in_features] bf16, in_features a multiple of 64; weight packed; residual, out
//           [num_tokens, out_features], out_features a multiple of 8; out may be residual
// Rounding  those of linear.cu and residual_add.cu, one after the other
// Mapping   linear_many.cuh, or linear_split.cuh for few tiles; a warp adds 16 bytes a lane at a time
// Cost      2 flops per token, row and k: bound by the tensor cores
// See       linear.cu, residual_add.cu, tests/kernels/test_bits_fused_linear.py

#include "linear_split.cuh"

struct AddSums {
    static constexpr int kParts = 1;
    static constexpr int kUnits = kWarpTokens * kRowChunks / kWarp;
    using Fetched = uint4;  // eight values of the residual
    bf16 *out;
    const bf16 *residual;
    int rows;

    __device__ __forceinline__ PartPlace part(int row_tile, int) const {
        return {0, row_tile * kBlockRows};
    }

    template <int kCount>
    __device__ __forceinline__ bool take(const float (&sum)[kCount], const WarpTile &tile) const {
        stage_sums(sum, tile);
        return true;
    }

    __device__ __forceinline__ Fetched fetch(int unit, const WarpTile &tile) const {
        UnitPlace place(unit, tile);
        return place.exists(tile, rows) ? load_vector(residual + place.offset(rows)) : Fetched{};
    }

    __device__ __forceinline__ void write(int unit, const WarpTile &tile, const Fetched &fetched) const {
        UnitPlace place(unit, tile);
        if (!place.exists(tile, rows)) return;
        float x[kVector], y[kVector];
        unpack(x, fetched);
        unpack(y, *tile.staged(place.place, place.chunk));
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = __fadd_rn(x[i], y[i]);
        store_vector(out + place.offset(rows), pack(x));
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
