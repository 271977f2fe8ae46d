// decode_batch_norm.cu -- RMSNorm of a decode batch; the first one also looks up the
// embedding, and the end of the step picks each token's id.
//
// Shapes    residual, normed [num_seqs, hidden_size] bf16
// Rounding  docs/numerics.md section 5: the bits of embedding.cu, rms_norm.cu and argmax.cu
// Mapping   one thread block per token; thread i is lane i of the tree
// Cost      6 bytes per value: bound by latency
// See       decode_batch.cu, twin/rms_norm.c, tests/kernels/test_bits_decode_batch.py

#include "../common/reduce.cuh"
#include "decode_batch.cuh"
#include "decode_candidate.cuh"

constexpr int kThreads = NUMERICS_NORM_LANES;
constexpr int kMaxRounds = 4;  // 2048 values each, kept in registers

struct NormArguments {
    const bf16 *weight;
    int hidden_size;
    float eps;
    bf16 *residual;
    bf16 *normed;
    BatchHeader *header;
    // The first norm of a step alone, which looks up the embedding and writes the header:
    const bf16 *table;  // packed embedding, or null
    const int32_t *ids, *seq_lens, *block_tables;
    int max_blocks_per_seq, num_seqs;
};

static __device__ __forceinline__ void write_header(const NormArguments &args) {
    int thread = (int)threadIdx.x;
    static_assert(kThreads >= kBatchMaxSeqs, "a thread per sequence");
    args.header->lengths[thread] = thread < args.num_seqs ? args.seq_lens[thread] : 0;
    if (thread != 0) return;
    args.header->num_seqs = args.num_seqs;
    args.header->max_blocks_per_seq = args.max_blocks_per_seq;
    args.header->block_tables = args.block_tables;
}

static __global__ void __launch_bounds__(kThreads) batch_norm_kernel(NormArguments args) {
    __shared__ float warp_sums[kThreads / kWarp];
    int token = (int)blockIdx.x, thread = (int)threadIdx.x, hidden = args.hidden_size;
    uint4 weights[kMaxRounds], rows[kMaxRounds];
#pragma unroll
    for (int i = 0; i < kMaxRounds; ++i) {
        int first = (i * kThreads + thread) * kVector;
        if (first < hidden) weights[i] = load_vector(args.weight + first);
    }
    let_next_kernel_start();
    wait_for_previous_kernel();
    bf16 *row = args.residual + (size_t)token * hidden;
    if (args.table != nullptr) {
        if (token == 0) write_header(args);
        int id = args.ids[token];
#pragma unroll
        for (int i = 0; i < kMaxRounds; ++i) {
            int chunk = i * kThreads + thread;
            if (chunk * kVector >= hidden) continue;
            rows[i] = load_vector(args.table + packed_offset(id, chunk, hidden));
            store_vector(row + chunk * kVector, rows[i]);
        }
    } else {
        int num_seqs =
            args.header->num_seqs;  // on its way together with the row, which is there in any case
#pragma unroll
        for (int i = 0; i < kMaxRounds; ++i) {
            int chunk = i * kThreads + thread;
            if (chunk * kVector < hidden) rows[i] = load_vector(row + chunk * kVector);
        }
        if (token >= num_seqs) return;
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxRounds; ++i) {
        if ((i * kThreads + thread) * kVector >= hidden) continue;
        float x[kVector];
        unpack(x, rows[i]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum = __fadd_rn(sum, __fmul_rn(x[j], x[j]));
    }
    float mean = __fdiv_rn(block_tree_sum(sum, warp_sums), (float)hidden);
    float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, args.eps)));
#pragma unroll
    for (int i = 0; i < kMaxRounds; ++i) {
        int chunk = i * kThreads + thread;
        if (chunk * kVector >= hidden) continue;
        float x[kVector], w[kVector];
        unpack(x, rows[i]);
        unpack(w, weights[i]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[j] = __fmul_rn(w[j], to_float(to_bf16(__fmul_rn(x[j], scale))));
        store_vector(args.normed + (size_t)token * hidden + chunk * kVector, pack(x));
    }
}

static Status launch_norm(const BatchStep &step, const bf16 *weight, const BatchIndex *batch,
                          cudaStream_t stream) {
    const DecodeProblem &p = step.problem;
    if (p.hidden_size > kMaxRounds * kThreads * kVector)
        return fail(STATUS_INVALID_ARGUMENT, "hidden_size must be at most %d, got %d",
                    kMaxRounds * kThreads * kVector, p.hidden_size);
    NormArguments args = {};
    args.weight = weight;
    args.hidden_size = p.hidden_size;
    args.eps = p.eps;
    args.residual = step.buffers.residual;
    args.normed = step.buffers.normed;
    args.header = step.buffers.header;
    if (batch != nullptr) {
        args.table = static_cast<const bf16 *>(p.embed_tokens.data);
        args.ids = batch->input_ids;
        args.seq_lens = batch->seq_lens;
        args.block_tables = batch->block_tables;
        args.max_blocks_per_seq = batch->max_blocks_per_seq;
        args.num_seqs = batch->num_seqs;
    }
    int num_blocks = batch != nullptr ? batch->num_seqs : step.bucket;
    return launch_chained(batch_norm_kernel, dim3((unsigned)num_blocks), kThreads, 0, 1, stream, args);
}

Status launch_batch_embedding(const BatchStep &step, const BatchIndex &batch, cudaStream_t stream) {
    return launch_norm(step, step.problem.layers[0].input_layernorm, &batch, stream);
}

Status launch_batch_norm(const BatchStep &step, const bf16 *weight, cudaStream_t stream) {
    return launch_norm(step, weight, nullptr, stream);
}

// The best of a token's candidates, one per tile of the vocabulary; and the next step's input.
static __global__ void __launch_bounds__(kThreads)
    batch_output_kernel(BatchBuffers buffers, int num_candidates, int32_t *next_ids, int32_t *input_ids,
                        int32_t *positions, int32_t *seq_lens) {
    __shared__ Candidate warp_best[kThreads / kWarp];
    int token = (int)blockIdx.x, thread = (int)threadIdx.x;
    let_next_kernel_start();
    wait_for_previous_kernel();
    Candidate best = no_candidate();
    for (int i = thread; i < num_candidates; i += kThreads)
        best.take_better(buffers.best_values[(size_t)token * num_candidates + i],
                         buffers.best_ids[(size_t)token * num_candidates + i]);
    best.take_best_of_warp();
    if (thread % kWarp == 0) warp_best[thread / kWarp] = best;
    __syncthreads();  // every warp's candidate visible to the first thread
    if (thread != 0) return;
    for (int i = 1; i < kThreads / kWarp; ++i) best.take_better(warp_best[i].value, warp_best[i].id);
    next_ids[token] = best.id;
    if (input_ids != nullptr) {
        input_ids[token] = best.id;
        ++positions[token];
        ++seq_lens[token];
    }
}

Status launch_batch_output(const BatchStep &step, const BatchIndex &batch, bool advance,
                           cudaStream_t stream) {
    // Written only to advance.
    int32_t *input_ids = advance ? const_cast<int32_t *>(batch.input_ids) : nullptr;
    return launch_chained(batch_output_kernel, dim3((unsigned)batch.num_seqs), kThreads, 0, 1, stream,
                          step.buffers, batch_vocabulary_tiles(step.problem.lm_head.rows),
                          step.problem.next_ids, input_ids, const_cast<int32_t *>(batch.positions),
                          const_cast<int32_t *>(batch.seq_lens));
}
