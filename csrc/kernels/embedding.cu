// embedding.cu -- look up each token's row of the embedding table, packed as the lm_head wants it.
//
//   out[t] = table[ids[t]]
//
// Shapes    table [vocab_size, hidden_size] packed (common/tile.cuh); ids [num_tokens];
//           out [num_tokens, hidden_size]
// Rounding  none: a copy
// Mapping   one thread block per token, one chunk of 16 bytes per thread and step
// Cost      4 bytes per value: memory-bound
// Source    transformers LlamaModel.embed_tokens
// See       twin/embedding.c, tests/kernels/test_bits_copies.py

#include "../common/cuda_status.h"
#include "../common/tile.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // 256 chunks of 8 values: a hidden vector of 2048 in one pass

static __global__ void embedding_kernel(bf16 *out, const bf16 *table, const int32_t *ids, int hidden_size) {
    int row = ids[blockIdx.x];
    bf16 *out_row = out + (size_t)blockIdx.x * hidden_size;
    for (int chunk = (int)threadIdx.x; chunk < hidden_size / kChunkValues; chunk += kThreads) {
        store_vector(out_row + chunk * kChunkValues,
                     load_vector(table + packed_offset(row, chunk, hidden_size)));
    }
}

extern "C" Status cuda_embedding(bf16 *out, const Matrix *table, const int32_t *ids, int num_tokens,
                                 Stream stream) {
    if (num_tokens == 0) return STATUS_OK;
    embedding_kernel<<<num_tokens, kThreads, 0, (cudaStream_t)stream>>>(out, (const bf16 *)table->data, ids,
                                                                        table->cols);
    return CUDA_STATUS(cudaGetLastError());
}
