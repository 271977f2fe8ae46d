// gated_linear.cu -- the MLP's two wide linear layers for many tokens, and its activation.
//
//   out[t, n] = bf16(silu(bf16(sum_k x[t, k] gate[n, k])) * bf16(sum_k x[t, k] up[n, k]))
//
// Shapes    x [num_tokens, hidden_size] bf16, hidden_size a multiple of 64; gate, up packed, of the same
//           shape, rows a multiple of 8; out [num_tokens, rows]
// Rounding  those of linear.cu and silu_and_mul.cu, one after the other
// Mapping   linear_many.cuh; half of a tile's rows are gate's, half the same rows of up: a lane holds both
// Cost      4 flops per token, row and k: bound by the tensor cores
// Source    transformers LlamaMLP.forward
// See       linear.cu, silu_and_mul.cu, tests/kernels/test_bits_fused_linear.py

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

extern "C" Status cuda_gated_linear(bf16 *out, const bf16 *x, const Matrix *gate, const Matrix *up,
                                    int num_tokens, Stream stream) {
    if (num_tokens == 0) return STATUS_OK;
    ManyOperands operands = {x, num_tokens, {gate, up}, 2};
    return launch_many(GateSums{out, gate->rows}, operands, (cudaStream_t)stream);
}
