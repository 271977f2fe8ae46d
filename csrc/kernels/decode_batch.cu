// decode_batch.cu -- a decode step of more than eight sequences: seven kernels a layer, chained.
//
//   per layer   norm;  q, k, v = x W, RoPE, cache write;  attention;  residual += attn Wo
//               norm;  act = silu(x Wg) * (x Wu);  residual += act Wd
//
// Shapes    as in DecodeProblem; up to 256 sequences of one new token each
// Rounding  every point of docs/numerics.md, in the order of the operations it replaces: the same bits
// Mapping   a bucket's launches, between the first kernel and the last, are recorded as a graph at its
// second
//           step and replayed from then on
// Cost      every weight and every cached key and value once
// See       decode_batch.cuh; tests/kernels/test_bits_decode_batch.py

#include <stdlib.h>

#include "decode_batch.cuh"

static int max_segments(int max_seq_len) {
    constexpr int kKeys = NUMERICS_TILE * NUMERICS_SEGMENT;
    return (max_seq_len + kKeys - 1) / kKeys;
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

// --- buckets: the numbers of sequences for which a step's launches are recorded

constexpr int kBuckets[] = {32, 64, 128, kBatchMaxSeqs};
constexpr int kNumBuckets = sizeof kBuckets / sizeof *kBuckets;

static int bucket_of(int num_seqs) {
    int bucket = 0;
    while (kBuckets[bucket] < num_seqs) ++bucket;
    return bucket;
}

static size_t carve(BatchBuffers *buffers, const DecodeProblem &p, int num_multiprocessors,
                    void *workspace) {
    Carver carver = {static_cast<char *>(workspace), 0};
    size_t seqs = min(p.max_num_seqs, kBatchMaxSeqs), rows = kBuckets[bucket_of((int)seqs)];
    size_t heads = (size_t)p.num_heads + 2 * p.num_kv_heads, q_size = (size_t)p.num_heads * kTileCols;
    size_t tiles = batch_vocabulary_tiles(p.lm_head.rows);
    buffers->header = carver.take<BatchHeader>(1);
    buffers->residual = carver.take<bf16>(rows * p.hidden_size);
    buffers->normed = carver.take<bf16>(rows * p.hidden_size);
    buffers->q = carver.take<bf16>(rows * q_size);
    buffers->attn = carver.take<bf16>(rows * q_size);
    buffers->act = carver.take<bf16>(rows * p.intermediate_size);
    buffers->best_values = carver.take<float>(rows * tiles);
    buffers->best_ids = carver.take<int>(rows * tiles);
    // The sums of every chunk of a linear layer's outputs, in whole tiles of at most 128 rows. They are dead
    // when the logits are written, and lie there where there is room.
    size_t most_rows = max((size_t)p.hidden_size, heads * kTileCols);
    size_t most_cols = max(max(p.hidden_size, p.intermediate_size), p.num_heads * kTileCols);
    size_t outputs = (most_rows + kMostTokens - 1) / kMostTokens * kMostTokens * rows;
    size_t vectors = (most_cols + NUMERICS_CHUNK - 1) / NUMERICS_CHUNK * outputs / 4;
    bool fits = vectors * sizeof(float4) <= seqs * p.lm_head.rows * sizeof(float);
    buffers->sums = fits ? reinterpret_cast<float4 *>(p.logits) : carver.take<float4>(vectors);
    buffers->arrivals = carver.take<unsigned>(outputs / (kTileCols * 32));
    // Of the rows that start in one block of the attention, the last alone can go on in the next block.
    size_t blocks = (size_t)num_multiprocessors;
    buffers->tickets = carver.take<unsigned>(blocks);
    buffers->segments = carver.take<char>(blocks * max_segments(p.max_seq_len) *
                                          batch_partial_bytes(p.num_heads / p.num_kv_heads));
    return carver.used;
}

size_t batch_workspace_bytes(const DecodeProblem &problem, int num_multiprocessors) {
    BatchBuffers buffers;
    return carve(&buffers, problem, num_multiprocessors, nullptr);
}

// The launches that are the same for every step of the bucket.
static Status launch_layers(const BatchStep &step, cudaStream_t stream) {
    const DecodeProblem &p = step.problem;
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

// --- graphs

struct DecodeGraphs {
    bool has_run[kNumBuckets];  // once without a graph, which loads the kernels
    cudaGraphExec_t graphs[kNumBuckets];
};

extern "C" Status cuda_open_decode_graphs(DecodeGraphs **graphs) {
    *graphs = static_cast<DecodeGraphs *>(calloc(1, sizeof(DecodeGraphs)));
    if (*graphs == nullptr)
        return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", sizeof(DecodeGraphs));
    return STATUS_OK;
}

extern "C" void cuda_close_decode_graphs(DecodeGraphs *graphs) {
    if (graphs == nullptr) return;
    for (cudaGraphExec_t graph : graphs->graphs)
        if (graph != nullptr) (void)cudaGraphExecDestroy(graph);
    free(graphs);
}

static Status capture(cudaGraphExec_t *executable, const BatchStep &step, cudaStream_t stream) {
    cudaGraph_t graph = nullptr;
    TRY(CUDA_STATUS(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)));
    Status status = launch_layers(step, stream);
    Status ended = CUDA_STATUS(cudaStreamEndCapture(stream, &graph));  // ends also where a launch failed
    if (status == STATUS_OK) status = ended;
    if (status == STATUS_OK) status = CUDA_STATUS(cudaGraphInstantiate(executable, graph, 0));
    if (graph == nullptr) return status;
    Status destroyed = CUDA_STATUS(cudaGraphDestroy(graph));
    return status == STATUS_OK ? destroyed : status;
}

static Status run_layers(const BatchStep &step, int bucket, cudaStream_t stream) {
    DecodeGraphs *graphs = step.problem.graphs;
    if (graphs == nullptr) return launch_layers(step, stream);
    if (!graphs->has_run[bucket]) {
        TRY(launch_layers(step, stream));
        graphs->has_run[bucket] = true;
        return STATUS_OK;
    }
    if (graphs->graphs[bucket] == nullptr) TRY(capture(&graphs->graphs[bucket], step, stream));
    return CUDA_STATUS(cudaGraphLaunch(graphs->graphs[bucket], stream));
}

Status launch_batch_step(const DecodeProblem &problem, const BatchIndex &batch, bool advance,
                         void *workspace, cudaStream_t stream) {
    int bucket = bucket_of(batch.num_seqs), device = 0;
    BatchStep step = {};
    step.problem = problem;
    step.max_segments = max_segments(problem.max_seq_len);
    step.bucket = kBuckets[bucket];
    step.tile_tokens = min(step.bucket, kMostTokens);
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    TRY(CUDA_STATUS(
        cudaDeviceGetAttribute(&step.num_multiprocessors, cudaDevAttrMultiProcessorCount, device)));
    carve(&step.buffers, problem, step.num_multiprocessors, workspace);
    TRY(launch_batch_embedding(step, batch, stream));
    TRY(run_layers(step, bucket, stream));
    return launch_batch_output(step, batch, advance, stream);
}
