// linear.cuh -- the two ways to compute a linear layer; linear.cu chooses, the bits do not depend on it.

#pragma once
#include "../common/cuda_status.h"
extern "C" {
#include "kernels.h"
}

// What both compute: out[t, n] = sum_k x[t, k] weight[n, k]. `out` is float32 if is_float, else bf16.
struct LinearProblem {
    void *out;           // [num_tokens, rows]
    const bf16 *x;       // [num_tokens, cols]
    const bf16 *weight;  // [rows, cols] packed
    int num_tokens;
    int rows;
    int cols;
    bool is_float;
};

// The most tokens for which launch_linear_few is meant: four instructions' width.
constexpr int kFewTokens = 32;

Status launch_linear_few(const LinearProblem &problem, cudaStream_t stream);
Status launch_linear_many(const LinearProblem &problem, cudaStream_t stream);
