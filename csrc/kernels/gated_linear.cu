// gated_linear.cu -- the MLP's two wide linear layers for many tokens, and its activation.
//
//   out[t, n] = bf16(silu(bf16(sum_k x[t, k] gate[n, k])) * bf16(sum_k x[t, k] up[n, k]))
//
// Shapes    x [num_tokens, hidden_size] bf16, hidden_size a multiple of 64; gate, up packed, of the same
//           shape, rows a multiple of 8; out [num_tokens, rows]
// Rounding  those of linear.cu and silu_and_mul.cu, one after the other
// Mapping   linear_many.cuh; half of a tile's rows are gate's, half the same rows of up: a thread holds
// both Cost      4 flops per token, row and k: bound by the tensor cores Source    transformers
// LlamaMLP.forward See       linear.cu, silu_and_mul.cu, tests/system/test_fused_prefill.py

#include "linear_many.cuh"
#include "silu.cuh"

struct GateSums {
    static constexpr int kParts = 2;
    bf16 *out;
    int rows;

    __device__ __forceinline__ PartPlace part(int row_tile, int p) const {
        return {p, row_tile * (kBlockRows / kParts)};
    }

    __device__ __forceinline__ void finish(const float (&sum)[kSums], const WarpTile &tile) const {
        constexpr int kCols = kBlockRows / kParts, kUp = kSums / kParts;
        auto pair = [&](int i) {
            float values[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                values[e] =
                    silu_and_mul(to_float(to_bf16(sum[i + e])), to_float(to_bf16(sum[kUp + i + e])));
            }
            return pack_bf16(values[0], values[1]);
        };
#pragma unroll
        for (int i = 0; i < kUp; i += 8)
            stage_fragments(tile, 2 * i, pair(i), pair(i + 2), pair(i + 4), pair(i + 6));
        take_staged<kCols>(tile, [&](int token_row, int chunk, uint4 values) {
            int token = tile.first_token + token_row, row = tile.row_tile * kCols + chunk * kChunkValues;
            if (token < tile.num_tokens && row < rows)
                store_vector(out + (size_t)token * rows + row, values);
        });
    }
};

extern "C" Status cuda_gated_linear(bf16 *out, const bf16 *x, const Matrix *gate, const Matrix *up,
                                    int num_tokens, Stream stream) {
    if (num_tokens == 0) return STATUS_OK;
    ManyOperands operands = {x, num_tokens, {gate, up}, 2};
    return launch_many(GateSums{out, gate->rows}, operands, (cudaStream_t)stream);
}
