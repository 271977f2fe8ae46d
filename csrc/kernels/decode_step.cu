// decode_step.cu -- a whole decode step in one launch: every layer, the LM head and arg-max. Steps of more
// sequences go to decode_batch.cu.
//
//   per layer   q, k, v = norm(x) W;  attention;  x += attn Wo;  act = silu(norm(x) Wg) * (norm(x) Wu)
//               x += act Wd
//
// Shapes    as in DecodeProblem; up to 8 sequences of one new token each
// Rounding  every point of docs/numerics.md, in the order of the operations it replaces: the same bits
// Mapping   one thread block per multiprocessor, all resident; weight rows are dealt out in units of eight;
//           from two sequences on two blocks are a cluster that shares its units by chunks of K
// Cost      every weight once: 2.47 GB for Llama 3.2 1B, 548 us at 4.51 TB/s
// Source    the idea of one launch per token: HazyResearch Megakernels; the schedule is static here
// See       decode_step.cuh, then decode_stream.cuh, decode_norm.cuh, decode_linear.cuh, decode_task.cuh,
//           decode_attention.cuh, decode_fold.cuh, decode_output.cuh, decode_grid.cuh;
//           tests/kernels/test_bits_decode_step.py

#include "decode_attention.cuh"
#include "decode_batch.cuh"
#include "decode_linear.cuh"
#include "decode_norm.cuh"
#include "decode_output.cuh"
#include "decode_stream.cuh"

// What a launch reads once: the new tokens' positions and rows of the RoPE table, and this thread's output
// of the embedding. Also how their attention is cut.
template <typename Shared>
static __device__ __forceinline__ float begin_step(Shared &shared, const StepArguments &args) {
    constexpr int kOutputs = Shared::kOutputs;
    const DecodeProblem &problem = args.problem;
    int thread = (int)threadIdx.x, hidden = problem.hidden_size;
    if (thread < args.num_seqs) {
        shared.positions[thread] = args.seq_lens[thread] - 1;
        int team = attention_team<Shared::kCluster>(args);
        shared.plans[thread] = plan_row(args, thread, team);
        shared.team = team;
    }
    int sequence = thread / kChunksPerRow, chunk = thread % kChunksPerRow;
    if (sequence < args.num_seqs) {
        const bf16 *row = problem.rope_table + (size_t)(args.seq_lens[sequence] - 1) * kTileCols;
        store_vector(shared.rope[sequence] + chunk * kVector, load_vector(row + chunk * kVector));
    }
    announce_positions();
    int unit = (int)blockIdx.x + thread / kOutputs * (int)gridDim.x, token = thread % kOutputs / kUnitRows;
    int row = unit * kUnitRows + thread % kUnitRows;
    if (row >= hidden || token >= args.num_seqs) return 0.0f;
    const Matrix &table = problem.embed_tokens;
    bf16 value = packed_data(
        table)[packed_offset(args.input_ids[token], row / kChunkValues, table.cols) + row % kChunkValues];
    problem.residual[(size_t)token * hidden + row] = value;
    return to_float(value);
}

template <typename Shared>
static __device__ __forceinline__ void consume(Shared &shared, const StepArguments &args) {
    const DecodeProblem &problem = args.problem;
    int num_tokens = Shared::kTokens == 1 ? 1 : args.num_seqs, hidden = problem.hidden_size;
    int piece = 0, round = 0, num_staged = 0, num_attended = 0;
    int q_size = problem.num_heads * kTileCols, kv_size = problem.num_kv_heads * kTileCols;
    int intermediate = args.layers[0].gate_proj.rows, vocab_size = problem.lm_head.rows;

    // This thread's element of the residual stream: the same output of the O and the down projection.
    float own_residual = begin_step(shared, args);
    Candidate best = no_candidate();
    HeldPiece held;
    // Where the stream starts with the norm's weight, that comes first.
    grid_barrier<kGridArrived>([&] { hold_first(shared, held, piece + 1, kPhaseQkv); });
    if (own_thread() == 0) shared.first_task = first_task_cursor(shared, args);
    // The phases of all layers in one loop: each part's code exists once and the instruction cache holds
    // it.
    int num_phases = problem.num_layers * kPhaseHead + 1;
#pragma unroll 1
    for (int i = 0; i < num_phases; ++i) {
        int phase = i == num_phases - 1 ? kPhaseHead : i % kPhaseHead;
        const bf16 *rows = phase == kPhaseO ? problem.attn : phase == kPhaseDown ? problem.act : nullptr;
        if (rows == nullptr)
            norm_phase(shared, piece, phase, problem.residual, hidden, problem.eps, num_tokens);
        compute_phase(shared, held, piece, round, num_staged, phase, rows, num_tokens,
                      [&](int token, int row, float value, float up) {
                          if (phase == kPhaseQkv) {
                              bf16 *out =
                                  row < q_size ? problem.q + (size_t)token * q_size + row
                                  : row < q_size + kv_size
                                      ? problem.k + (size_t)token * kv_size + row - q_size
                                      : problem.v + (size_t)token * kv_size + row - q_size - kv_size;
                              *out = to_bf16(value);
                          } else if (phase == kPhaseGateUp) {
                              float gate = to_float(to_bf16(value));
                              problem.act[row_place(num_tokens, token, row, intermediate)] =
                                  to_bf16(silu_and_mul(gate, to_float(to_bf16(up))));
                          } else if (phase == kPhaseHead) {
                              if (row >= vocab_size) return;
                              problem.logits[(size_t)token * vocab_size + row] = value;
                              best.take_better(value, row);
                          } else {
                              bf16 sum = to_bf16(__fadd_rn(own_residual, to_float(to_bf16(value))));
                              own_residual = to_float(sum);
                              problem.residual[(size_t)token * hidden + row] = sum;
                          }
                      });
        if (phase == kPhaseHead) break;
        if (phase == kPhaseQkv) {
            grid_barrier<kGridArrived>([] {});
            attention_phase(shared, args, args.layers[i / kPhaseHead].cache, piece, num_attended);
        }
        int next = i + 2 == num_phases ? kPhaseHead : (phase + 1) % kPhaseHead;
        bool has_norm = next != kPhaseO && next != kPhaseDown;
        auto hold_next = [&] { hold_first(shared, held, piece + has_norm, next); };
        if (phase == kPhaseGateUp) {
            grid_barrier<kGridEarly>(hold_next);
        } else {
            grid_barrier<kGridArrived>(hold_next);
        }
    }
    argmax_phase(shared, args, best);
}

template <int kTokens, int kCluster>
static __global__ void __launch_bounds__(kStepThreads, 1)
    decode_step_kernel(const __grid_constant__ StepArguments args) {
    extern __shared__ unsigned char raw[];
    using Shared = StepShared<kTokens, kCluster>;
    Shared &shared = *reinterpret_cast<Shared *>(raw);
    int thread = (int)threadIdx.x;
    if (thread < Shared::kTurns) barrier_init(shared_address(&shared.full[thread]), 1);
    if (thread < Shared::kSlots) barrier_init(shared_address(&shared.empty[thread]), 1);
    if (thread == 0) {
        barrier_init(shared_address(&shared.norm_here), 1);
        barrier_init(shared_address(&shared.input_here), 1);
        barrier_init(shared_address(&shared.sums_here), 1);
        barrier_init(shared_address(&shared.tiles_here), 1);
        barrier_init(shared_address(&shared.tiles_folded), 1);
        barrier_init(shared_address(&shared.sums_added), max(1, (kCluster - 1) * kConsumerWarps));
    }
    if (thread < Shared::kTurns) barrier_init_fence();
    int phase = thread / kWarp;
    if (phase < kNumPhases && thread % kWarp == 0)
        shared.orders[phase] = order_of_phase<Shared>(args, phase);
    meet_cluster<kCluster>();  // the barriers and the orders exist before anybody uses them
    if (thread >= kConsumers) {
        give_registers<kProducerRegisters>();
        if (thread < kConsumers + kWarp) {
            produce(shared, args);
        } else if (thread < kConsumers + 2 * kWarp) {
            keep_grid_barriers<kStoresDone, kGridArrived>(&args.counters->arrivals,
                                                          1 + args.problem.num_layers * (kPhaseHead + 1));
        } else if (thread < kConsumers + 3 * kWarp) {
            keep_grid_barriers<kFirstStoresDone, kGridEarly>(&args.counters->early_arrivals,
                                                             args.problem.num_layers);
        }
    } else {
        take_registers<kConsumerRegisters>();
        consume(shared, args);
    }
    if (kCluster > 1) meet_cluster<kCluster>();  // nobody leaves while others still arrive here
}

// --- host

static Status num_multiprocessors(int *count) {
    int device = 0;
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    return CUDA_STATUS(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

constexpr size_t kMaxBlocks = 256;  // room for the candidates of any card of this kind

static size_t candidates_bytes(void) {
    return kMaxBlocks * kStepTokens * (sizeof(float) + sizeof(int));
}
static size_t tickets_bytes(const DecodeProblem *p) {
    return (kStepTokens * (size_t)p->num_kv_heads * sizeof(unsigned) + 127) / 128 * 128;
}

static size_t step_workspace_bytes(const DecodeProblem *p) {
    size_t segments =
        kStepTokens * (size_t)p->num_kv_heads * ((p->max_seq_len + kSegmentKeys - 1) / kSegmentKeys);
    size_t tiles = NUMERICS_SEGMENT * kMaxBlocks;  // at most, where a part is a tile
    size_t group = (size_t)(p->num_heads / p->num_kv_heads), parts = segments > tiles ? segments : tiles;
    size_t bytes = sizeof(StepCounters) + candidates_bytes() + tickets_bytes(p) +
                   parts * group * kPartColumns * sizeof(float);
    return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

extern "C" int cuda_decode_max_seqs(void) {
    return kBatchMaxSeqs;
}

// A thread keeps one element of the residual stream: a card, or a slice of one, needs this many
// multiprocessors.
static bool are_enough(int num_blocks, int hidden_size) {
    if (num_blocks < 1 || num_blocks > (int)kMaxBlocks) return false;
    int units = (hidden_size + kUnitRows - 1) / kUnitRows;
    return (units + num_blocks - 1) / num_blocks * kStepTokens * kUnitRows <= kConsumers;
}

extern "C" Status cuda_decode_workspace_bytes(size_t *bytes, const DecodeProblem *p) {
    int num_blocks = 0;
    TRY(num_multiprocessors(&num_blocks));
    bool is_served = are_enough(num_blocks / kClusterBlocks * kClusterBlocks, p->hidden_size) &&
                     p->hidden_size <= kMaxHidden && p->intermediate_size <= kMaxIntermediate &&
                     p->num_heads / p->num_kv_heads <= kMaxGroup && p->num_layers <= kMaxLayers;
    *bytes = is_served ? step_workspace_bytes(p) + batch_workspace_bytes(*p, num_blocks) : 0;
    return STATUS_OK;
}

template <int kTokens, int kCluster>
static Status launch_step(const StepArguments &args, int num_blocks, cudaStream_t stream) {
    const int kBytes = (int)sizeof(StepShared<kTokens, kCluster>);
    static_assert(kBytes <= 227 * 1024, "what a block may have");
    TRY(CUDA_STATUS(cudaFuncSetAttribute(decode_step_kernel<kTokens, kCluster>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {(unsigned)kCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = (unsigned)(num_blocks / kCluster * kCluster);
    config.blockDim = kStepThreads;
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = kCluster > 1 ? 2 : 1;
    return CUDA_STATUS(cudaLaunchKernelEx(&config, decode_step_kernel<kTokens, kCluster>, args));
}

extern "C" Status cuda_decode_step(const DecodeProblem *problem, const BatchIndex *batch, int advance,
                                   Stream stream) {
    char *workspace = static_cast<char *>(problem->workspace);
    if (batch->num_seqs > kStepTokens)
        return launch_batch_step(*problem, *batch, advance != 0, workspace + step_workspace_bytes(problem),
                                 (cudaStream_t)stream);
    StepArguments args = {};
    args.problem = *problem;
    for (int i = 0; i < problem->num_layers; ++i) args.layers[i] = problem->layers[i];
    args.input_ids = const_cast<int32_t *>(batch->input_ids);  // written only to advance
    args.positions = const_cast<int32_t *>(batch->positions);
    args.seq_lens = const_cast<int32_t *>(batch->seq_lens);
    args.block_tables = batch->block_tables;
    args.max_blocks_per_seq = batch->max_blocks_per_seq;
    args.num_seqs = batch->num_seqs;
    args.advance = advance != 0;
    args.scale = (float)(1.4426950408889634074 / sqrt((double)kTileCols));
    args.counters = reinterpret_cast<StepCounters *>(workspace);
    workspace += sizeof(StepCounters);
    args.best_values = reinterpret_cast<float *>(workspace);
    args.best_ids = reinterpret_cast<int *>(args.best_values + kMaxBlocks * kStepTokens);
    workspace += candidates_bytes();
    args.tickets = reinterpret_cast<unsigned *>(workspace);
    workspace += tickets_bytes(problem);
    args.parts = reinterpret_cast<float *>(workspace);
    int num_blocks = 0;
    TRY(num_multiprocessors(&num_blocks));
    cudaStream_t on = (cudaStream_t)stream;
    if (args.num_seqs == 1) return launch_step<1, 1>(args, num_blocks, on);
    if (args.num_seqs <= kFewTokens) return launch_step<kFewTokens, kClusterBlocks>(args, num_blocks, on);
    return launch_step<kStepTokens, kClusterBlocks>(args, num_blocks, on);
}
