// rotary_embedding.cu -- rotate each head's vector by its token's position.
//
//   out[i]       = bf16(bf16(x[i] cos_i) - bf16(x[i + d/2] sin_i))
//   out[i + d/2] = bf16(bf16(x[i + d/2] cos_i) + bf16(x[i] sin_i))        i = 0 .. d/2 - 1, d = head_dim
//
// Shapes    x, out [num_tokens, num_heads, head_dim] bf16; table [max_positions, head_dim] bf16: cos | sin,
// of
//           which the first half of each is stored; positions [num_tokens]
// Rounding  each product and the sum to bf16, as transformers does
// Mapping   one thread per pair (i, i + d/2); a warp covers the 32 pairs of a head of 64
// Cost      4 bytes per value: memory-bound
// Source    transformers apply_rotary_pos_emb; Su et al., arXiv:2104.09864
// See       twin/rotary_embedding.c, tests/kernels/test_bits_rotary_embedding.py

#include "../common/cuda_status.h"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // full occupancy at any register count

static __global__ void rotary_embedding_kernel(bf16 *out, const bf16 *x, const bf16 *table,
                                               const int32_t *positions, int num_heads, int head_dim,
                                               int64_t num_pairs) {
    int64_t index = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (index >= num_pairs) return;
    int half = head_dim / 2;
    int pair = (int)(index % half);
    int64_t vector = index / half;  // token * num_heads + head
    const bf16 *row = table + (size_t)positions[vector / num_heads] * head_dim;
    float cosine = to_float(row[pair]), sine = to_float(row[half + pair]);
    size_t first = (size_t)vector * head_dim + pair;
    float low = to_float(x[first]), high = to_float(x[first + half]);
    out[first] = to_bf16(__fsub_rn(bf16_product(low, cosine), bf16_product(high, sine)));
    out[first + half] = to_bf16(__fadd_rn(bf16_product(high, cosine), bf16_product(low, sine)));
}

extern "C" Status cuda_rotary_embedding(bf16 *out, const bf16 *x, const bf16 *table,
                                        const int32_t *positions, int num_tokens, int num_heads,
                                        int head_dim, Stream stream) {
    int64_t num_pairs = (int64_t)num_tokens * num_heads * (head_dim / 2);
    if (num_pairs == 0) return STATUS_OK;
    int64_t num_blocks = (num_pairs + kThreads - 1) / kThreads;
    rotary_embedding_kernel<<<(unsigned)num_blocks, kThreads, 0, (cudaStream_t)stream>>>(
        out, x, table, positions, num_heads, head_dim, num_pairs);
    return CUDA_STATUS(cudaGetLastError());
}
