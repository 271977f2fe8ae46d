// decode_batch.cu -- a decode step of more than eight sequences: seven kernels a layer, chained.
//
//   per layer   norm;  q, k, v = x W, RoPE, cache write;  attention;  residual += attn Wo
//               norm;  act = silu(x Wg) * (x Wu);  residual += act Wd
//
// Shapes    as in DecodeProblem; up to 256 sequences of one new token each
// Rounding  every point of docs/numerics.md, in the order of the operations it replaces: the same bits
// Cost      every weight and every cached key and value once
// See       decode_batch.cuh; tests/kernels/test_bits_decode_batch.py

#include "decode_batch.cuh"

static int max_segments(int max_seq_len) {
    return (max_seq_len + kSegmentKeys - 1) / kSegmentKeys;
}

// Hands out a workspace piece by piece; with a null start it only counts.
struct Carver {
    char *start;
    size_t used;

    template <typename T>
    T *take(size_t count) {
        T *piece = start == nullptr ? nullptr : reinterpret_cast<T *>(start + used);
        used += (count * sizeof(T) + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
        return piece;
    }
};

static size_t carve(BatchBuffers *buffers, const DecodeProblem &p, void *workspace) {
    Carver carver = {static_cast<char *>(workspace), 0};
    size_t seqs = min(p.max_num_seqs, kBatchMaxSeqs);
    size_t rows = (seqs + kMostTokens - 1) / kMostTokens * kMostTokens;
    size_t q_size = (size_t)p.num_heads * kTileCols, tiles = batch_vocabulary_tiles(p.lm_head.rows);
    buffers->residual = carver.take<bf16>(rows * p.hidden_size);
    buffers->normed = carver.take<bf16>(rows * p.hidden_size);
    buffers->q = carver.take<bf16>(rows * q_size);
    buffers->attn = carver.take<bf16>(rows * q_size);
    buffers->act = carver.take<bf16>(rows * p.intermediate_size);
    buffers->best_values = carver.take<float>(rows * tiles);
    buffers->best_ids = carver.take<int>(rows * tiles);
    buffers->tickets = carver.take<unsigned>(rows * p.num_kv_heads);
    buffers->segments =
        carver.take<float>(seqs * p.num_heads * max_segments(p.max_seq_len) * kPartialColumns);
    return carver.used;
}

size_t batch_workspace_bytes(const DecodeProblem &problem) {
    BatchBuffers buffers;
    return carve(&buffers, problem, nullptr);
}

static Status launch_layers(const BatchStep &step, cudaStream_t stream) {
    const DecodeProblem &p = step.problem;
    TRY(launch_batch_embedding(step, stream));
    for (int i = 0; i < p.num_layers; ++i) {
        const DecodeLayer &layer = p.layers[i];
        TRY(launch_batch_qkv(step, layer, stream));
        TRY(launch_batch_attention(step, layer, stream));
        TRY(launch_batch_o(step, layer, stream));
        TRY(launch_batch_norm(step, layer.post_attention_layernorm, stream));
        TRY(launch_batch_gate_up(step, layer, stream));
        TRY(launch_batch_down(step, layer, stream));
        TRY(launch_batch_norm(step, i + 1 < p.num_layers ? p.layers[i + 1].input_layernorm : p.norm,
                              stream));
    }
    return launch_batch_head(step, stream);
}

Status launch_batch_step(const DecodeProblem &problem, const BatchIndex &batch, bool advance,
                         void *workspace, cudaStream_t stream) {
    BatchStep step = {};
    step.problem = problem;
    step.input_ids = const_cast<int32_t *>(batch.input_ids);  // written only to advance
    step.positions = const_cast<int32_t *>(batch.positions);
    step.seq_lens = const_cast<int32_t *>(batch.seq_lens);
    step.block_tables = batch.block_tables;
    step.max_blocks_per_seq = batch.max_blocks_per_seq;
    step.num_seqs = batch.num_seqs;
    step.max_segments = max_segments(problem.max_seq_len);
    step.tile_tokens = batch_tile_tokens(batch.num_seqs);
    carve(&step.buffers, problem, workspace);
    int device = 0;
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    TRY(CUDA_STATUS(
        cudaDeviceGetAttribute(&step.num_multiprocessors, cudaDevAttrMultiProcessorCount, device)));
    TRY(launch_layers(step, stream));
    return launch_batch_output(step, problem.next_ids, advance, stream);
}
