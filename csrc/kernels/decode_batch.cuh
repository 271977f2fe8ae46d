// decode_batch.cuh -- what the kernels of a decode step for more than eight sequences share.
//
// Such a step is a chain of kernels, seven a layer, each started while the one before it ends
// (programmatic dependent launch). Nothing that a step changes is read before wait_for_previous_kernel():
// before it a kernel may only fetch weights. What differs from step to step is read from memory, so that
// one graph of launches serves every step of a bucket: up to 32, 64, 128 or 256 sequences.

#pragma once
#include "../common/cuda_status.h"
#include "../common/kv_tile.cuh"
#include "../common/launch.cuh"
#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/tile.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kBatchMaxSeqs = 256;
constexpr int kMostTokens = 128;  // of a token tile
constexpr size_t kWorkspaceAlignment = 1024;

// What the first kernel of a step tells the others.
struct BatchHeader {
    int num_seqs;
    int max_blocks_per_seq;
    const int32_t *block_tables;  // [num_seqs, max_blocks_per_seq]
    int lengths[kBatchMaxSeqs];   // of the sequences, their new token included; 0 beyond the last
};

// The workspace of such a step. Activations have room for whole token tiles; rows beyond the last sequence's
// hold what they may.
struct BatchBuffers {
    BatchHeader *header;
    bf16 *residual;      // [num_seqs, hidden_size]
    bf16 *normed;        // [num_seqs, hidden_size]
    bf16 *q;             // [num_seqs, num_heads, 64], rotated
    bf16 *attn;          // [num_seqs, num_heads, 64]
    bf16 *act;           // [num_seqs, intermediate_size]
    float *best_values;  // [num_seqs, vocabulary tiles]
    int *best_ids;       // [num_seqs, vocabulary tiles]
    float4 *sums;        // of the tiles that several blocks share: decode_batch_exchange.cuh
    unsigned *arrivals;  // of those tiles, zero between uses
    unsigned *tickets;   // [num_multiprocessors], zero between uses
    void *segments;      // [num_multiprocessors, max_segments], batch_partial_bytes each
};

// What the launches of a bucket depend on.
struct BatchStep {
    DecodeProblem problem;
    BatchBuffers buffers;
    int max_segments;
    int bucket;       // the most sequences: 32, 64, 128 or 256
    int tile_tokens;  // 32, 64 or 128
    int num_multiprocessors;
};

inline int batch_token_tiles(const BatchStep &step) {
    return step.bucket / step.tile_tokens;
}

// The step's kernels, in the order of a layer.
Status launch_batch_embedding(const BatchStep &step, const BatchIndex &batch, cudaStream_t stream);
Status launch_batch_norm(const BatchStep &step, const bf16 *weight, cudaStream_t stream);
Status launch_batch_qkv(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream);
Status launch_batch_attention(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream);
size_t batch_partial_bytes(int heads_per_kv_head);  // of a segment's result
Status launch_batch_o(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream);
Status launch_batch_gate_up(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream);
Status launch_batch_down(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream);
Status launch_batch_head(const BatchStep &step, cudaStream_t stream);
int batch_vocabulary_tiles(int vocab_size);
// Of more than 64 sequences (decode_batch_split.cu, decode_batch_many.cu).
Status launch_batch_qkv_many(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream);
Status launch_batch_gate_up_many(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream);
Status launch_batch_head_many(const BatchStep &step, cudaStream_t stream);
Status launch_batch_output(const BatchStep &step, const BatchIndex &batch, bool advance,
                           cudaStream_t stream);

// The step as a whole (decode_batch.cu).
size_t batch_workspace_bytes(const DecodeProblem &problem, int num_multiprocessors);
Status launch_batch_step(const DecodeProblem &problem, const BatchIndex &batch, bool advance,
                         void *workspace, cudaStream_t stream);
