// linear.cu -- the linear layer: picks the kernel by the number of tokens.
//
//   out[t, n] = bf16(sum_k x[t, k] weight[n, k])          (logits: float32, unrounded)
//
// Shapes    x [num_tokens, in_features] bf16; weight [out_features, in_features] packed (common/tile.cuh);
//           out [num_tokens, out_features]; in_features a multiple of 16
// Rounding  docs/numerics.md section 2: k16 steps of the tensor cores in chunks of 512, chunk sums in fp32
// Mapping   few tokens stream the weights (linear_few.cu), many tokens reuse them (linear_many.cu)
// Source    transformers LlamaForCausalLM, torch.nn.Linear
// See       twin/linear.c, tests/kernels/test_bits_linear.py

#include "linear.cuh"

#include "../common/tile.cuh"

static Status launch_linear(void *out, const bf16 *x, const Matrix *weight, int num_tokens, bool is_float,
                            Stream stream) {
    if (num_tokens == 0 || weight->rows == 0) return STATUS_OK;
    LinearProblem problem = {out,          x,       (const bf16 *)weight->data, num_tokens, weight->rows,
                             weight->cols, is_float};
    if (num_tokens > kFewTokens && weight->cols % kTileCols == 0) {
        return launch_linear_many(problem, (cudaStream_t)stream);
    }
    // An in_features that is no multiple of 64 does not occur in a model: a few tokens at a time will do.
    size_t value_size = is_float ? sizeof(float) : sizeof(bf16);
    for (int first = 0; first < num_tokens; first += kFewTokens) {
        LinearProblem part = problem;
        part.out = (char *)out + (size_t)first * weight->rows * value_size;
        part.x = x + (size_t)first * weight->cols;
        part.num_tokens = num_tokens - first < kFewTokens ? num_tokens - first : kFewTokens;
        TRY(launch_linear_few(part, (cudaStream_t)stream));
    }
    return STATUS_OK;
}

extern "C" Status cuda_linear(bf16 *out, const bf16 *x, const Matrix *weight, int num_tokens,
                              Stream stream) {
    return launch_linear(out, x, weight, num_tokens, false, stream);
}

extern "C" Status cuda_linear_f32(float *out, const bf16 *x, const Matrix *weight, int num_tokens,
                                  Stream stream) {
    return launch_linear(out, x, weight, num_tokens, true, stream);
}

extern "C" int cuda_fused_min_tokens(void) {
    return kFewTokens + 1;
}
