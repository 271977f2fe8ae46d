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

#include "gate_sums.cuh"

extern "C" Status cuda_gated_linear(bf16 *out, const bf16 *x, const Matrix *gate, const Matrix *up,
                                    int num_tokens, Stream stream) {
    if (num_tokens == 0) return STATUS_OK;
    ManyOperands operands = {x, num_tokens, {gate, up}, 2};
    return launch_many(GateSums{out, gate->rows}, operands, (cudaStream_t)stream);
}
