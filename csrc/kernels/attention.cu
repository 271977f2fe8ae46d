// attention.cu -- causal attention over the paged cache: picks the kernel for each sequence.
//
//   out[t, h] = sum_j softmax_j(q[t, h] k[j, h / g] / sqrt(d)) v[j, h / g]       j = 0 .. position of t
//
// Shapes    q, out [num_tokens, num_heads, 64] bf16; cache as in kv_cache.cu; g = num_heads / num_kv_heads
// Rounding  docs/numerics.md section 4: tiles of 128 keys at absolute positions, each by itself; segments
// of
//           eight tiles; folds in ascending order. Probabilities to bf16, everything else fp32
// Mapping   sequences with few new tokens share out their segments (attention_decode.cu), the others their
//           query rows (attention_prefill.cu); many with one each, beside others, go as a decode batch does
//           (decoding_rows.cuh)
// Source    transformers LlamaAttention (sdpa); Dao et al., arXiv:2205.14135
// See       twin/attention.c, tests/kernels/test_bits_attention.py

#include "attention.cuh"
#include "decoding_rows.cuh"

#include <math.h>

constexpr double kLog2E = 1.4426950408889634074;

extern "C" Status cuda_attention(bf16 *out, const bf16 *q, const KvLayer *cache, const BatchIndex *batch,
                                 int num_heads, Stream stream) {
    if (cache->head_dim != kHeadDim) {
        return fail(STATUS_INVALID_ARGUMENT, "head_dim must be %d, got %d", kHeadDim, cache->head_dim);
    }
    if (batch->num_tokens == 0) return STATUS_OK;
    AttentionProblem problem = {};
    problem.out = out;
    problem.q = q;
    problem.cache = *cache;
    problem.cu_seqlens_q = batch->cu_seqlens_q;
    problem.seq_lens = batch->seq_lens;
    problem.block_tables = batch->block_tables;
    problem.max_blocks_per_seq = batch->max_blocks_per_seq;
    problem.num_seqs = batch->num_seqs;
    problem.num_heads = num_heads;
    problem.group_size = num_heads / cache->num_kv_heads;
    problem.max_seq_len_q = batch->max_seq_len_q;
    problem.max_seq_len = batch->max_seq_len;
    problem.scale = (float)(kLog2E / sqrt((double)cache->head_dim));

    bool decode_can = fits_decode(1, problem.group_size) && batch->max_seq_len <= decode_max_seq_len();
    bool all_decode = decode_can && fits_decode(batch->max_seq_len_q, problem.group_size);
    bool is_told_apart = batch->prefill_seqs != nullptr && !all_decode;
    if (is_told_apart && serves_decoding_rows(*cache, *batch, num_heads)) {
        TRY(launch_decoding_rows(out, q, *cache, *batch, num_heads, (cudaStream_t)stream));
        if (batch->num_prefill_seqs == 0) return STATUS_OK;
        problem.sequences = batch->prefill_seqs;
        problem.num_seqs = batch->num_prefill_seqs;
        return launch_attention_prefill(problem, true, (cudaStream_t)stream);
    }
    if (decode_can && (all_decode || batch->num_seqs > 1)) {
        TRY(launch_attention_decode(problem, (cudaStream_t)stream));
    }
    if (all_decode) return STATUS_OK;
    bool takes_all = !decode_can || batch->num_seqs == 1;
    if (is_told_apart && !takes_all) {
        problem.sequences = batch->prefill_seqs;
        problem.num_seqs = batch->num_prefill_seqs;
    }
    return launch_attention_prefill(problem, takes_all, (cudaStream_t)stream);
}
