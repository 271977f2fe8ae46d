// decode_step.cu -- a whole decode step in one launch: every layer, the LM head and arg-max.
//
//   per layer   q, k, v = norm(x) W;  attention;  x += attn Wo;  act = silu(norm(x) Wg) * (norm(x) Wu);  x
//   += act Wd
//
// Shapes    as in DecodeProblem; up to 8 sequences of one new token each
// Rounding  every point of docs/numerics.md, in the order of the operations it replaces: the same bits
// Mapping   one thread block per multiprocessor, all resident. Weight rows are dealt out in units of eight;
// a warp
//           takes one chunk of one unit (the columns of mma.m16n8k16; the tokens are its rows), chunk sums
//           meet in shared memory and are added in order. A producer warp streams the weights ahead through
//           a ring
// Cost      every weight once: 2.47 GB for Llama 3.2 1B, 548 us at 4.51 TB/s
// Source    the idea of one launch per token: HazyResearch Megakernels; the schedule is static here
// See       decode_step.cuh, decode_attention.cuh, tests/kernels/test_bits_decode_step.py

#include "decode_attention.cuh"

constexpr int kStepsPerChunk = NUMERICS_CHUNK / NUMERICS_STEP;
constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;

// The workspace: a counter for the grid barrier, one for the end, arg-max candidates, tickets, segments.
struct StepWorkspace {
    unsigned arrivals;
    unsigned finished;
    unsigned padding[30];
};

struct StepArguments {
    DecodeProblem problem;
    AttentionWork attention;
    int32_t *input_ids;
    int32_t *seq_lens;  // the same as attention's, writable
    int32_t *positions;
    bool advance;  // write the next step's input_ids, seq_lens and positions
    StepWorkspace *workspace;
    float *best_values;  // [gridDim, kStepTokens]
    int *best_ids;       // [gridDim, kStepTokens]
};

// Where a block is in its own stream of pieces: the producer and every consumer count alike.
struct StreamPlace {
    int piece;  // pieces of the phases before this one

    __device__ static int slot(int piece) { return piece % kSlots; }
    __device__ static int parity(int piece) { return piece / kSlots & 1; }
};

// --- producer
// -------------------------------------------------------------------------------------------------

// The block's pieces of one phase, in order: unit by unit, part by part, chunk by chunk.
static __device__ void stream_phase(StepShared &shared, StreamPlace &place, const PhaseWeights &weights) {
    int lane = (int)threadIdx.x % kWarp;
    int own = weights.own_units(), parts = weights.parts(), num_chunks = weights.num_chunks();
    for (int i = 0; i < own; ++i) {
        int unit = (int)blockIdx.x + i * (int)gridDim.x;
        for (int part = 0; part < parts; ++part) {
            const bf16 *data = weights.unit_data(unit, part);
            for (int chunk = 0; chunk < num_chunks; ++chunk, ++place.piece) {
                int slot = StreamPlace::slot(place.piece);
                int tiles = min(kTilesPerChunk, weights.cols / kTileCols - chunk * kTilesPerChunk);
                barrier_wait(shared_address(&shared.empty[slot]), StreamPlace::parity(place.piece) ^ 1);
                if (lane == 0) {
                    constexpr int kStripBytes = kStripValues * (int)sizeof(bf16);
                    uint32_t full = shared_address(&shared.full[slot]);
                    barrier_arrive_expect(full, tiles * kStripBytes);
                    copy_bulk(shared_address(shared.ring[slot]),
                              data + (size_t)chunk * kTilesPerChunk * kStripValues, tiles * kStripBytes, full);
                }
            }
        }
    }
}

static __device__ void produce(StepShared &shared, const DecodeProblem &problem) {
    StreamPlace place = {0};
    for (int i = 0; i < problem.num_layers; ++i) {
        const DecodeLayer &layer = problem.layers[i];
        stream_phase(shared, place, qkv_weights(layer));
        stream_phase(shared, place, one_matrix(layer.o_proj));
        stream_phase(shared, place, gate_up_weights(layer));
        stream_phase(shared, place, one_matrix(layer.down_proj));
    }
    stream_phase(shared, place, one_matrix(problem.lm_head));
}

// --- consumers
// ------------------------------------------------------------------------------------------------

// Activations of a phase: in shared memory (kIsShared) or, freshly written by other blocks, in global
// memory.
struct PhaseInput {
    const bf16 *rows;
    int stride;
};

// The chain of one piece: 8 tokens x 8 weight rows, left in shared.sums[index].
template <bool kIsShared>
static __device__ __forceinline__ void piece_sums(StepShared &shared, const PhaseInput &input,
                                                  int num_tokens, int piece, int first_k, int num_steps,
                                                  int index) {
    int lane = (int)threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    uint32_t tokens[kStepsPerChunk][2];
    const bf16 *row = input.rows + (size_t)g * input.stride + first_k + 2 * q;
#pragma unroll
    for (int s = 0; s < kStepsPerChunk; ++s) {
        bool exists = g < num_tokens && s < num_steps;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bf16 *from = row + s * NUMERICS_STEP + 8 * half;
            tokens[s][half] = !exists ? 0 : kIsShared ? load_pair(from) : load_fresh_pair(from);
        }
    }
    int slot = StreamPlace::slot(piece);
    uint32_t ring = shared_address(shared.ring[slot]);
    barrier_wait(shared_address(&shared.full[slot]), StreamPlace::parity(piece));
    float acc[4] = {};
#pragma unroll
    for (int s = 0; s < kStepsPerChunk; s += 2) {
        if (s >= num_steps) break;  // K is a multiple of 64: steps come in fours
        uint32_t weights[4];
        int chunk = s % (kTileCols / NUMERICS_STEP) * 2 + lane / 8;
        uint32_t strip = ring + s * NUMERICS_STEP / kTileCols * (kUnitRows * kTileCols * (int)sizeof(bf16));
        load_matrix_x4(weights, strip + tile_offset(lane % 8, chunk) * (int)sizeof(bf16));
        const uint32_t even[4] = {tokens[s][0], 0, tokens[s][1], 0};
        const uint32_t odd[4] = {tokens[s + 1][0], 0, tokens[s + 1][1], 0};
        mma_m16n8k16(acc, even, weights[0], weights[1]);
        mma_m16n8k16(acc, odd, weights[2], weights[3]);
    }
    __syncwarp();  // every lane has read the slot before it is filled again
    if (lane == 0) barrier_arrive(shared_address(&shared.empty[slot]));
    *reinterpret_cast<float2 *>(&shared.sums[index][g * kUnitRows + 2 * q]) = make_float2(acc[0], acc[1]);
}

// The block's pieces of one phase; epilogue(unit, token, row, value, second) gets each output once,
// `second` being the paired matrix's value.
template <bool kIsShared, typename Epilogue>
static __device__ void compute_phase(StepShared &shared, StreamPlace &place, const PhaseWeights &weights,
                                     const PhaseInput &input, int num_tokens, Epilogue epilogue) {
    int warp = (int)threadIdx.x / kWarp;
    int num_chunks = weights.num_chunks(), tasks_per_unit = weights.tasks_per_unit();
    int own = weights.own_units(), units_per_round = kRoundTasks / tasks_per_unit;
    for (int first_unit = 0; first_unit < own; first_unit += units_per_round) {
        int num_units = min(units_per_round, own - first_unit), num_tasks = num_units * tasks_per_unit;
        int first_piece = place.piece;
        // Which warp takes which piece follows from the piece's number in the whole stream.
        int first_task = (warp - first_piece % kConsumerWarps + kConsumerWarps) % kConsumerWarps;
        for (int task = first_task; task < num_tasks; task += kConsumerWarps) {
            int first_k = task % num_chunks * NUMERICS_CHUNK;
            int num_steps = min(NUMERICS_CHUNK, weights.cols - first_k) / NUMERICS_STEP;
            piece_sums<kIsShared>(shared, input, num_tokens, first_piece + task, first_k, num_steps, task);
        }
        place.piece += num_tasks;
        consumer_barrier();  // the round's chunk sums visible to the threads that add them
        constexpr int kOutputs = kStepTokens * kUnitRows;
        for (int i = (int)threadIdx.x; i < num_units * kOutputs; i += kConsumers) {
            int token = i % kOutputs / kUnitRows, output = i % kOutputs;
            if (token >= num_tokens) continue;
            const float (*sums)[kOutputs] = &shared.sums[i / kOutputs * tasks_per_unit];
            float value = sums[0][output], second = 0.0f;
            for (int c = 1; c < num_chunks; ++c) value = __fadd_rn(value, sums[c][output]);
            if (weights.is_paired) {
                second = sums[num_chunks][output];
                for (int c = 1; c < num_chunks; ++c)
                    second = __fadd_rn(second, sums[num_chunks + c][output]);
            }
            int unit = (int)blockIdx.x + (first_unit + i / kOutputs) * (int)gridDim.x;
            epilogue(token, unit * kUnitRows + i % kUnitRows, value, second);
        }
        consumer_barrier();  // the sums are read before the next round writes them
    }
}

// RMSNorm of all tokens into shared memory, a warp per token, docs/numerics.md section 5: this lane holds
// the contract's lanes `lane`, 32 + lane, ..
static __device__ void norm_phase(StepShared &shared, const DecodeProblem &problem, const bf16 *weight,
                                  int num_tokens) {
    int token = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    constexpr int kGroups = NUMERICS_NORM_LANES / kWarp;
    if (token < num_tokens) {
        const bf16 *x = problem.residual + (size_t)token * problem.hidden_size;
        uint4 values[kGroups];
        float sums[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            int first = (i * kWarp + lane) * kVector;
            values[i] = first < problem.hidden_size ? load_fresh_vector(x + first) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            float unpacked[kVector];
            unpack(unpacked, values[i]);
            sums[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                sums[i] = __fadd_rn(sums[i], __fmul_rn(unpacked[j], unpacked[j]));
        }
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
            for (int i = 0; i < kGroups; ++i)
                sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kFullWarp, sums[i], offset));
        }
#pragma unroll
        for (int offset = kGroups / 2; offset > 0; offset /= 2) {
            float next[kGroups];
#pragma unroll
            for (int i = 0; i < kGroups; ++i) next[i] = __fadd_rn(sums[i], sums[i ^ offset]);
#pragma unroll
            for (int i = 0; i < kGroups; ++i) sums[i] = next[i];
        }
        float mean = __fdiv_rn(sums[0], (float)problem.hidden_size);
        float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, problem.eps)));
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            int first = (i * kWarp + lane) * kVector;
            if (first >= problem.hidden_size) continue;
            float x_values[kVector], weights[kVector];
            unpack(x_values, values[i]);
            unpack(weights, load_vector(weight + first));
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                x_values[j] = __fmul_rn(weights[j], to_float(to_bf16(__fmul_rn(x_values[j], scale))));
            store_vector(shared.normed + token * kNormedStride + first, pack(x_values));
        }
    }
    consumer_barrier();  // the normalised rows visible to every warp
}

static __device__ __forceinline__ bf16 silu_and_mul(float gate, float up) {
    float g = to_float(to_bf16(gate)), u = to_float(to_bf16(up));
    float e = contract_exp2(__fmul_rn(-g, __int_as_float(LOG2_E)));
    return to_bf16(__fmul_rn(to_float(to_bf16(__fdiv_rn(g, __fadd_rn(1.0f, e)))), u));
}

constexpr int kNoId = 0x7fffffff;

// Larger value, then lower id; NaN above every number.
static __device__ __forceinline__ bool is_better(float value, int id, float best, int best_id) {
    bool is_nan = value != value, best_is_nan = best != best;
    if (is_nan != best_is_nan) return is_nan;
    if (!is_nan && value != best) return value > best;
    return id < best_id;
}

// Each thread's best logit of its token to the token's best of the whole grid.
static __device__ void argmax_phase(StepShared &shared, const StepArguments &args, int num_tokens,
                                    float best, int best_id) {
    constexpr int kPerToken = kUnitRows;  // threads i with i % 64 / 8 == token hold it
    float *values = &shared.sums[0][0];
    int *ids = reinterpret_cast<int *>(values + kConsumers);
    values[threadIdx.x] = best;
    ids[threadIdx.x] = best_id;
    consumer_barrier();  // the threads' candidates visible to the threads that compare them
    int token = (int)threadIdx.x;
    if (token < num_tokens) {
        best = __int_as_float(0xff800000);
        best_id = kNoId;
        for (int i = 0; i < kConsumers; ++i) {
            if (i / kPerToken % kStepTokens == token && is_better(values[i], ids[i], best, best_id)) {
                best = values[i];
                best_id = ids[i];
            }
        }
        args.best_values[blockIdx.x * kStepTokens + token] = best;
        args.best_ids[blockIdx.x * kStepTokens + token] = best_id;
        __threadfence();  // the block's candidates are out before it reports
    }
    consumer_barrier();  // every token's
    if (threadIdx.x == 0) shared.is_last = atomicAdd(&args.workspace->finished, 1) == gridDim.x - 1;
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
    __threadfence();  // the other blocks' candidates after their reports
    if (token < num_tokens) {
        best = __int_as_float(0xff800000);
        best_id = kNoId;
        for (int i = 0; i < (int)gridDim.x; ++i) {
            float value = __ldcg(args.best_values + i * kStepTokens + token);
            int id = __ldcg(args.best_ids + i * kStepTokens + token);
            if (is_better(value, id, best, best_id)) {
                best = value;
                best_id = id;
            }
        }
        args.problem.next_ids[token] = best_id;
        if (args.advance) {
            args.input_ids[token] = best_id;
            args.seq_lens[token]++;
            args.positions[token]++;
        }
    }
    if (threadIdx.x == 0) args.workspace->finished = args.workspace->arrivals = 0;  // for the next launch
}

static __device__ void embedding_phase(const StepArguments &args, int num_tokens) {
    const Matrix &table = args.problem.embed_tokens;
    int chunk = (int)threadIdx.x;
    for (int token = (int)blockIdx.x; token < num_tokens; token += (int)gridDim.x) {
        if (chunk * kVector >= table.cols) continue;
        const bf16 *from =
            static_cast<const bf16 *>(table.data) + packed_offset(args.input_ids[token], chunk, table.cols);
        store_vector(args.problem.residual + (size_t)token * table.cols + chunk * kVector,
                     load_vector(from));
    }
}

static __device__ void consume(StepShared &shared, const StepArguments &args) {
    const DecodeProblem &problem = args.problem;
    int num_tokens = args.attention.num_seqs, hidden = problem.hidden_size;
    int q_size = problem.num_heads * kTileCols, kv_size = problem.num_kv_heads * kTileCols;
    PhaseInput normed = {shared.normed, kNormedStride};
    GridBarrier barrier = {&args.workspace->arrivals, 0};
    StreamPlace place = {0};

    auto add_to_residual = [&](int token, int row, float value, float) {
        bf16 *x = problem.residual + (size_t)token * hidden + row;
        *x = to_bf16(__fadd_rn(to_float(__ldcg(x)), to_float(to_bf16(value))));
    };
    embedding_phase(args, num_tokens);
    grid_barrier(barrier);
    for (int i = 0; i < problem.num_layers; ++i) {
        const DecodeLayer &layer = problem.layers[i];
        int intermediate = layer.gate_proj.rows;
        norm_phase(shared, problem, layer.input_layernorm, num_tokens);
        compute_phase<true>(shared, place, qkv_weights(layer), normed, num_tokens,
                            [&](int token, int row, float value, float) {
                                bf16 result = to_bf16(value);
                                if (row < q_size)
                                    problem.q[(size_t)token * q_size + row] = result;
                                else if (row < q_size + kv_size)
                                    problem.k[(size_t)token * kv_size + row - q_size] = result;
                                else
                                    problem.v[(size_t)token * kv_size + row - q_size - kv_size] = result;
                            });
        grid_barrier(barrier);
        attention_phase(shared, problem, args.attention, layer);
        grid_barrier(barrier);
        compute_phase<false>(shared, place, one_matrix(layer.o_proj), {problem.attn, q_size}, num_tokens,
                             add_to_residual);
        grid_barrier(barrier);
        norm_phase(shared, problem, layer.post_attention_layernorm, num_tokens);
        compute_phase<true>(shared, place, gate_up_weights(layer), normed, num_tokens,
                            [&](int token, int row, float gate, float up) {
                                problem.act[(size_t)token * intermediate + row] = silu_and_mul(gate, up);
                            });
        grid_barrier(barrier);
        compute_phase<false>(shared, place, one_matrix(layer.down_proj), {problem.act, intermediate},
                             num_tokens, add_to_residual);
        grid_barrier(barrier);
    }
    norm_phase(shared, problem, problem.norm, num_tokens);
    float best = __int_as_float(0xff800000);
    int best_id = kNoId;
    compute_phase<true>(shared, place, one_matrix(problem.lm_head), normed, num_tokens,
                        [&](int token, int row, float value, float) {
                            if (row >= problem.lm_head.rows) return;
                            problem.logits[(size_t)token * problem.lm_head.rows + row] = value;
                            if (is_better(value, row, best, best_id)) {
                                best = value;
                                best_id = row;
                            }
                        });
    argmax_phase(shared, args, num_tokens, best, best_id);
}

static __global__ void __launch_bounds__(kStepThreads, 1)
    decode_step_kernel(const __grid_constant__ StepArguments args) {
    extern __shared__ unsigned char raw[];
    StepShared &shared = *reinterpret_cast<StepShared *>(raw);
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kSlots; ++slot) {
            barrier_init(shared_address(&shared.full[slot]), 1);
            barrier_init(shared_address(&shared.empty[slot]), 1);
        }
        barrier_init_fence();
    }
    __syncthreads();  // the ring's barriers exist before anybody uses them
    if (threadIdx.x >= kConsumers) {
        produce(shared, args.problem);
    } else {
        consume(shared, args);
    }
}

// --- host
// -----------------------------------------------------------------------------------------------------

static Status num_multiprocessors(int *count) {
    int device = 0;
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    return CUDA_STATUS(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

static int max_segments(int max_seq_len) {
    constexpr int kKeys = NUMERICS_TILE * NUMERICS_SEGMENT;
    return (max_seq_len + kKeys - 1) / kKeys;
}

constexpr size_t kMaxBlocks = 256;  // room for the candidates of any card of this kind

static size_t candidates_bytes(void) {
    return kMaxBlocks * kStepTokens * (sizeof(float) + sizeof(int));
}
static size_t tickets_bytes(const DecodeProblem *p) {
    return (kStepTokens * (size_t)p->num_kv_heads * sizeof(unsigned) + 127) / 128 * 128;
}

extern "C" int cuda_decode_max_seqs(void) {
    return kStepTokens;
}

extern "C" size_t cuda_decode_workspace_bytes(const DecodeProblem *p, int max_seq_len) {
    if (p->hidden_size > kMaxHidden || p->num_heads / p->num_kv_heads > kMaxGroup) return 0;
    return sizeof(StepWorkspace) + candidates_bytes() + tickets_bytes(p) +
           kStepTokens * (size_t)p->num_heads * max_segments(max_seq_len) * kPartialColumns * sizeof(float);
}

extern "C" Status cuda_decode_step(const DecodeProblem *problem, const BatchIndex *batch, int advance,
                                   Stream stream) {
    char *workspace = static_cast<char *>(problem->workspace);
    StepArguments args = {};
    args.problem = *problem;
    args.input_ids = const_cast<int32_t *>(batch->input_ids);  // written only to advance
    args.seq_lens = const_cast<int32_t *>(batch->seq_lens);
    args.positions = const_cast<int32_t *>(batch->positions);
    args.advance = advance != 0;
    args.workspace = reinterpret_cast<StepWorkspace *>(workspace);
    workspace += sizeof(StepWorkspace);
    args.best_values = reinterpret_cast<float *>(workspace);
    args.best_ids = reinterpret_cast<int *>(args.best_values + kMaxBlocks * kStepTokens);
    workspace += candidates_bytes();
    args.attention.tickets = reinterpret_cast<unsigned *>(workspace);
    workspace += tickets_bytes(problem);
    args.attention.segments = reinterpret_cast<float *>(workspace);
    args.attention.max_segments = max_segments(batch->max_seq_len);
    args.attention.seq_lens = batch->seq_lens;
    args.attention.block_tables = batch->block_tables;
    args.attention.max_blocks_per_seq = batch->max_blocks_per_seq;
    args.attention.num_seqs = batch->num_seqs;
    args.attention.scale = (float)(1.4426950408889634074 / sqrt((double)kTileCols));
    int num_blocks = 0;
    TRY(num_multiprocessors(&num_blocks));
    TRY(CUDA_STATUS(cudaFuncSetAttribute(decode_step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)sizeof(StepShared))));
    void *parameters[] = {&args};
    return CUDA_STATUS(cudaLaunchCooperativeKernel(reinterpret_cast<const void *>(decode_step_kernel),
                                                   dim3((unsigned)num_blocks), dim3(kStepThreads),
                                                   parameters, sizeof(StepShared), (cudaStream_t)stream));
}
