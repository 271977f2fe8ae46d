// gate_sums.cuh -- gate, up and silu as an Operation of linear_many.cuh: half of a tile's rows are gate's, half
// the same rows of up; a lane holds both.

#pragma once
#include "linear_many.cuh"
#include "silu.cuh"

struct GateSums {
    static constexpr int kParts = 2;
    static constexpr int kOutChunks = kRowChunks / kParts;  // of a row: gate's, and up's
    static constexpr int kUnits = kWarpTokens * kOutChunks / kWarp;
    using Fetched = Nothing;
    bf16 *out;
    int rows;

    __device__ __forceinline__ PartPlace part(int row_tile, int p) const {
        return {p, row_tile * (kBlockRows / kParts)};
    }

    __device__ __forceinline__ bool take(const float (&sum)[kSums], const WarpTile &tile) const {
        stage_sums(sum, tile);
        return true;
    }

    __device__ __forceinline__ Fetched fetch(int, const WarpTile &) const { return {}; }

    __device__ __forceinline__ void write(int unit, const WarpTile &tile, const Fetched &) const {
        int index = unit * kWarp + tile.lane, place = index / kOutChunks, chunk = index % kOutChunks;
        int token = tile.first_token + place;
        int row = (tile.row_tile * kOutChunks + chunk) * kChunkValues;
        if (token >= tile.num_tokens || row >= rows) return;
        float g[kVector], u[kVector];
        unpack(g, *tile.staged(place, chunk));
        unpack(u, *tile.staged(place, kOutChunks + chunk));
#pragma unroll
        for (int i = 0; i < kVector; ++i) g[i] = silu_and_mul(g[i], u[i]);
        store_vector(out + (size_t)token * rows + row, pack(g));
    }
};
