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

constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;
constexpr int kStepsPerTile = kTileCols / NUMERICS_STEP;
constexpr int kOutputs = kStepTokens * kUnitRows;  // of a unit

// --- producer

// One piece of contiguous bytes, by one lane.
static __device__ __forceinline__ void stream_piece(StepShared &shared, int piece, const bf16 *from,
                                                    int bytes, uint64_t policy) {
    int slot = slot_of(piece);
    uint32_t full = shared_address(&shared.full[piece % (2 * kSlots)]);
    barrier_wait(shared_address(&shared.empty[slot]), parity_of(piece) ^ 1);
    barrier_arrive_expect(full, bytes);
    copy_bulk_with_policy(shared_address(shared.ring[slot]), from, bytes, full, policy);
}

// The block's pieces of one phase, in PhaseOrder; by one lane.
static __device__ void stream_phase(StepShared &shared, int &piece, const PhaseWeights &weights,
                                    int num_tokens, uint64_t policy) {
    PhaseOrder order(weights, num_tokens);
    int k_tiles = weights.cols / kTileCols;
    for (int group = 0; group < order.num_groups; ++group) {
        for (int i = 0; i < order.own_units * order.parts; ++i) {
            int unit = (int)blockIdx.x + i / order.parts * (int)gridDim.x;
            int first_tile = group * order.chunks_per_group * kTilesPerChunk;
            const bf16 *from = weights.unit_data(unit, i % order.parts) + (size_t)first_tile * kStripValues;
            for (int chunk = 0; chunk < order.group_chunks(group); ++chunk, ++piece) {
                int tiles = min(kTilesPerChunk, k_tiles - first_tile - chunk * kTilesPerChunk);
                stream_piece(shared, piece, from, tiles * kStripBytes, policy);
                from += kTilesPerChunk * kStripValues;
            }
        }
    }
}

static __device__ __noinline__ void produce(StepShared &shared, const StepArguments &args) {
    const DecodeProblem &problem = args.problem;
    // Weights are used once a step: they should not drive activations and tables out of the L2 cache.
    uint64_t once = evict_first_policy();
    int norm_bytes = problem.hidden_size * (int)sizeof(bf16), num_tokens = args.num_seqs;
    bool is_elected = threadIdx.x % kWarp == 0;
    int piece = 0;
    auto stream_all = [&](const bf16 *norm, const PhaseWeights &weights) {
        if (norm) stream_piece(shared, piece++, norm, norm_bytes, once);
        stream_phase(shared, piece, weights, num_tokens, once);
    };
    for (int i = 0; i < problem.num_layers; ++i) {
        const DecodeLayer &layer = args.layers[i];
        if (is_elected) stream_all(layer.input_layernorm, qkv_weights(layer));
        piece = __shfl_sync(kFullWarp, piece, 0);
        stream_cache(shared, args, layer.cache, piece);
        if (is_elected) {
            stream_all(nullptr, one_matrix(layer.o_proj));
            stream_all(layer.post_attention_layernorm, gate_up_weights(layer));
            stream_all(nullptr, one_matrix(layer.down_proj));
        }
    }
    if (is_elected) stream_all(problem.norm, one_matrix(problem.lm_head));
}

// --- consumers

// The operands of one k tile: of the tokens (rows g) and of the weights (columns g), four steps.
struct TileFragments {
    uint32_t tokens[kStepsPerTile][2];
    uint32_t weights[2][4];

    __device__ __forceinline__ void load(const bf16 *token_row, bool has_token, uint32_t strip) {
        int lane = (int)threadIdx.x % kWarp;
#pragma unroll
        for (int s = 0; s < kStepsPerTile; ++s) {
            tokens[s][0] = has_token ? load_pair(token_row + s * NUMERICS_STEP) : 0;
            tokens[s][1] = has_token ? load_pair(token_row + s * NUMERICS_STEP + 8) : 0;
        }
        load_matrix_x4(weights[0], strip + tile_offset(lane % 8, lane / 8) * (int)sizeof(bf16));
        load_matrix_x4(weights[1], strip + tile_offset(lane % 8, lane / 8 + 4) * (int)sizeof(bf16));
    }
    __device__ __forceinline__ void multiply(float (&acc)[4]) const {
#pragma unroll
        for (int s = 0; s < kStepsPerTile; ++s) {
            const uint32_t rows[4] = {tokens[s][0], 0, tokens[s][1], 0};
            mma_m16n8k16(acc, rows, weights[s / 2][s % 2 * 2], weights[s / 2][s % 2 * 2 + 1]);
        }
    }
};

// The chain of one piece, 8 tokens x 8 weight rows, into sums. `input` is the chunk's first value of token
// 0.
static __device__ __forceinline__ void piece_sums(StepShared &shared, const bf16 *input, int stride,
                                                  int num_tokens, int piece, int num_tiles, float *sums) {
    int lane = (int)threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    const bf16 *row = input + g * stride + 2 * q;
    bool has_token = g < num_tokens;
    uint32_t strip = wait_for_piece(shared, piece);
    float acc[4] = {};
    TileFragments even, odd;
    even.load(row, has_token, strip);
    for (int tile = 0; tile < num_tiles;
         tile += 2) {  // the next tile is loaded while this one's chain runs
        if (tile + 1 < num_tiles) {
            odd.load(row + (tile + 1) * kTileCols, has_token, strip + (tile + 1) * kStripBytes);
        }
        even.multiply(acc);
        if (tile + 2 < num_tiles) {
            even.load(row + (tile + 2) * kTileCols, has_token, strip + (tile + 2) * kStripBytes);
        }
        if (tile + 1 < num_tiles) odd.multiply(acc);
    }
    __syncwarp();  // every lane has read the piece before it is filled again
    if (lane == 0) release_piece(shared, piece);
    *reinterpret_cast<float2 *>(sums + g * kUnitRows + 2 * q) = make_float2(acc[0], acc[1]);
}

// Columns first .. first + width - 1 of the tokens' rows into shared.input.
static __device__ __forceinline__ void stage_input(StepShared &shared, const bf16 *rows, int cols,
                                                   int first, int width, int stride, int num_tokens) {
    int vectors = width / kVector;
    for (int i = (int)threadIdx.x; i < num_tokens * vectors; i += kConsumers) {
        int token = i / vectors, column = i % vectors * kVector;
        store_vector(shared.input + token * stride + column,
                     load_fresh_vector(rows + (size_t)token * cols + first + column));
    }
    consumer_barrier();  // the rows visible to every warp
}

// The block's pieces of one phase. `rows` [num_tokens, cols] are other blocks' results; null if
// shared.input holds the normalised rows already. epilogue(token, row, value, second) gets each output
// once, `second` being the paired matrix's value.
template <typename Epilogue>
static __device__ __forceinline__ void compute_phase(StepShared &shared, int &piece,
                                                     const PhaseWeights &weights, const bf16 *rows,
                                                     int num_tokens, Epilogue epilogue) {
    int warp = (int)threadIdx.x / kWarp;
    PhaseOrder order(weights, num_tokens);
    int per_unit = order.parts * order.num_chunks;
    int stride = min(order.chunks_per_group * NUMERICS_CHUNK, weights.cols) + kInputPadding;
    int units_per_round = order.num_groups == 1 ? kRoundTasks / per_unit : order.own_units;
    for (int first_unit = 0; first_unit < order.own_units; first_unit += units_per_round) {
        int num_units = min(units_per_round, order.own_units - first_unit);
        for (int group = 0; group < order.num_groups; ++group) {
            int first_chunk = group * order.chunks_per_group, chunks = order.group_chunks(group);
            int first_k = first_chunk * NUMERICS_CHUNK,
                width = min(chunks * NUMERICS_CHUNK, weights.cols - first_k);
            if (rows != nullptr && first_unit == 0) {
                if (group > 0) consumer_barrier();  // the previous columns are read
                stage_input(shared, rows, weights.cols, first_k, width, stride, num_tokens);
            }
            // Which warp takes which piece follows from the piece's number in the whole stream.
            int first_task = (warp - piece % kConsumerWarps + kConsumerWarps) % kConsumerWarps;
            int num_tasks = num_units * order.parts * chunks;
            for (int task = first_task; task < num_tasks; task += kConsumerWarps) {
                int chunk = task % chunks;
                int tiles = min(NUMERICS_CHUNK, width - chunk * NUMERICS_CHUNK) / kTileCols;
                piece_sums(shared, shared.input + chunk * NUMERICS_CHUNK, stride, num_tokens, piece + task,
                           tiles, shared.sums[task / chunks * order.num_chunks + first_chunk + chunk]);
            }
            piece += num_tasks;
        }
        consumer_barrier();  // the round's chunk sums visible to the threads that add them
        for (int i = (int)threadIdx.x; i < num_units * kOutputs; i += kConsumers) {
            int output = i % kOutputs, token = output / kUnitRows;
            if (token >= num_tokens) continue;
            const float (*sums)[kOutputs] = &shared.sums[i / kOutputs * per_unit];
            float value = sums[0][output], second = 0.0f;
            for (int c = 1; c < order.num_chunks; ++c) value = __fadd_rn(value, sums[c][output]);
            if (weights.is_paired) {
                second = sums[order.num_chunks][output];
                for (int c = 1; c < order.num_chunks; ++c)
                    second = __fadd_rn(second, sums[order.num_chunks + c][output]);
            }
            int unit = (int)blockIdx.x + (first_unit + i / kOutputs) * (int)gridDim.x;
            epilogue(token, unit * kUnitRows + output % kUnitRows, value, second);
        }
        if (first_unit + units_per_round < order.own_units) consumer_barrier();  // the sums are read
    }
}

// RMSNorm of all tokens into shared.input, a warp per token, docs/numerics.md section 5: this lane holds
// the contract's lanes `lane`, 32 + lane, .. The weight is the stream's next piece.
static __device__ __noinline__ void norm_phase(StepShared &shared, int &piece,
                                                  const DecodeProblem &problem, int num_tokens) {
    int token = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp, hidden = problem.hidden_size;
    constexpr int kGroups = NUMERICS_NORM_LANES / kWarp;
    if (token < num_tokens) {
        const bf16 *x = problem.residual + (size_t)token * hidden;
        uint4 values[kGroups];
        float sums[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            int first = (i * kWarp + lane) * kVector;
            values[i] = first < hidden ? load_fresh_vector(x + first) : make_uint4(0, 0, 0, 0);
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
        // The eight group sums by xor 4, 2, 1.
        float sum = __fadd_rn(__fadd_rn(__fadd_rn(sums[0], sums[4]), __fadd_rn(sums[2], sums[6])),
                              __fadd_rn(__fadd_rn(sums[1], sums[5]), __fadd_rn(sums[3], sums[7])));
        float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)hidden), problem.eps)));
        wait_for_piece(shared, piece);
        const bf16 *weight = reinterpret_cast<const bf16 *>(shared.ring[slot_of(piece)]);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            int first = (i * kWarp + lane) * kVector;
            if (first >= hidden) continue;
            float x_values[kVector], weights[kVector];
            unpack(x_values, values[i]);
            unpack(weights, load_vector(weight + first));
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                x_values[j] = __fmul_rn(weights[j], to_float(to_bf16(__fmul_rn(x_values[j], scale))));
            store_vector(shared.input + token * (hidden + kInputPadding) + first, pack(x_values));
        }
    }
    consumer_barrier();  // the normalised rows visible to every warp, the weight read by all
    if (threadIdx.x == 0) release_piece(shared, piece);
    ++piece;
}

static __device__ __forceinline__ bf16 silu_and_mul(float gate, float up) {
    float g = to_float(to_bf16(gate)), u = to_float(to_bf16(up));
    float e = contract_exp2(__fmul_rn(-g, __int_as_float(LOG2_E)));
    return to_bf16(__fmul_rn(to_float(to_bf16(__fdiv_rn(g, __fadd_rn(1.0f, e)))), u));
}

// A logit and where it stands; the better of two is the larger value, then the lower id; NaN above every
// number.
struct Candidate {
    float value;
    int id;

    __device__ void take_better(float other, int other_id) {
        bool is_nan = value != value, other_is_nan = other != other;
        bool is_better = is_nan != other_is_nan      ? other_is_nan
                         : !is_nan && value != other ? other > value
                                                     : other_id < id;
        if (is_better) {
            value = other;
            id = other_id;
        }
    }
    __device__ void take_best_of_warp() {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
            float other = __shfl_xor_sync(kFullWarp, value, offset);
            int other_id = __shfl_xor_sync(kFullWarp, id, offset);
            take_better(other, other_id);
        }
    }
};
static __device__ __forceinline__ Candidate no_candidate() {
    return {__int_as_float(0xff800000), 0x7fffffff};
}

// Each thread's best logit of its token to the token's best of the whole grid; a warp per token.
static __device__ void argmax_phase(StepShared &shared, const StepArguments &args, Candidate own) {
    float *values = &shared.sums[0][0];
    int *ids = reinterpret_cast<int *>(values + kConsumers);
    int token = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    consumer_barrier();  // the last sums are read
    values[threadIdx.x] = own.value;
    ids[threadIdx.x] = own.id;
    consumer_barrier();  // the threads' candidates visible to the warps that compare them
    if (token < args.num_seqs) {
        Candidate best = no_candidate();
        // Thread i held outputs i mod 64, so those of token t are the eight from 8 t in each 64.
        for (int i = lane; i < kConsumers / kStepTokens; i += kWarp) {
            int thread = i / kUnitRows * kOutputs + token * kUnitRows + i % kUnitRows;
            best.take_better(values[thread], ids[thread]);
        }
        best.take_best_of_warp();
        if (lane == 0) {
            args.best_values[blockIdx.x * kStepTokens + token] = best.value;
            args.best_ids[blockIdx.x * kStepTokens + token] = best.id;
            __threadfence();  // the block's candidate is out before the block reports
        }
    }
    consumer_barrier();  // every token's
    if (threadIdx.x == 0) shared.is_last = atomicAdd(&args.counters->finished, 1) == gridDim.x - 1;
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
    __threadfence();  // the other blocks' candidates after their reports
    if (token < args.num_seqs) {
        Candidate best = no_candidate();
        for (int i = lane; i < (int)gridDim.x; i += kWarp)
            best.take_better(__ldcg(args.best_values + i * kStepTokens + token),
                             __ldcg(args.best_ids + i * kStepTokens + token));
        best.take_best_of_warp();
        if (lane == 0) {
            args.problem.next_ids[token] = best.id;
            if (args.advance) {
                args.input_ids[token] = best.id;
                args.seq_lens[token]++;
                args.positions[token]++;
            }
        }
    }
    if (threadIdx.x == 0) args.counters->finished = args.counters->arrivals = 0;  // for the next launch
}

static __device__ void embedding_phase(const StepArguments &args) {
    const Matrix &table = args.problem.embed_tokens;
    int chunk = (int)threadIdx.x;
    for (int token = (int)blockIdx.x; token < args.num_seqs; token += (int)gridDim.x) {
        if (chunk * kVector >= table.cols) continue;
        const bf16 *from = packed_data(table) + packed_offset(args.input_ids[token], chunk, table.cols);
        store_vector(args.problem.residual + (size_t)token * table.cols + chunk * kVector,
                     load_vector(from));
    }
}

static __device__ void consume(StepShared &shared, const StepArguments &args) {
    const DecodeProblem &problem = args.problem;
    int num_tokens = args.num_seqs, hidden = problem.hidden_size, piece = 0;
    int q_size = problem.num_heads * kTileCols, kv_size = problem.num_kv_heads * kTileCols;
    unsigned *arrivals = &args.counters->arrivals, arrived = 0;

    auto add_to_residual = [&](int token, int row, float value, float) {
        bf16 *x = problem.residual + (size_t)token * hidden + row;
        *x = to_bf16(__fadd_rn(to_float(__ldcg(x)), to_float(to_bf16(value))));
    };
    embedding_phase(args);
    grid_barrier(arrivals, arrived);
    for (int i = 0; i < problem.num_layers; ++i) {
        const DecodeLayer &layer = args.layers[i];
        int intermediate = layer.gate_proj.rows;
        norm_phase(shared, piece, problem, num_tokens);
        compute_phase(shared, piece, qkv_weights(layer), nullptr, num_tokens,
                      [&](int token, int row, float value, float) {
                          bf16 *out = row < q_size ? problem.q + (size_t)token * q_size + row
                                      : row < q_size + kv_size
                                          ? problem.k + (size_t)token * kv_size + row - q_size
                                          : problem.v + (size_t)token * kv_size + row - q_size - kv_size;
                          *out = to_bf16(value);
                      });
        grid_barrier(arrivals, arrived);
        attention_phase(shared, args, layer.cache, piece);
        grid_barrier(arrivals, arrived);
        compute_phase(shared, piece, one_matrix(layer.o_proj), problem.attn, num_tokens, add_to_residual);
        grid_barrier(arrivals, arrived);
        norm_phase(shared, piece, problem, num_tokens);
        compute_phase(shared, piece, gate_up_weights(layer), nullptr, num_tokens,
                      [&](int token, int row, float gate, float up) {
                          problem.act[(size_t)token * intermediate + row] = silu_and_mul(gate, up);
                      });
        grid_barrier(arrivals, arrived);
        compute_phase(shared, piece, one_matrix(layer.down_proj), problem.act, num_tokens, add_to_residual);
        grid_barrier(arrivals, arrived);
    }
    norm_phase(shared, piece, problem, num_tokens);
    Candidate best = no_candidate();
    int vocab_size = problem.lm_head.rows;
    compute_phase(shared, piece, one_matrix(problem.lm_head), nullptr, num_tokens,
                  [&](int token, int row, float value, float) {
                      if (row >= vocab_size) return;
                      problem.logits[(size_t)token * vocab_size + row] = value;
                      best.take_better(value, row);
                  });
    argmax_phase(shared, args, best);
}

static __global__ void __launch_bounds__(kStepThreads, 1)
    decode_step_kernel(const __grid_constant__ StepArguments args) {
    extern __shared__ unsigned char raw[];
    StepShared &shared = *reinterpret_cast<StepShared *>(raw);
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kSlots; ++slot) {
            barrier_init(shared_address(&shared.full[slot]), 1);
            barrier_init(shared_address(&shared.full[kSlots + slot]), 1);
            barrier_init(shared_address(&shared.empty[slot]), 1);
        }
        barrier_init_fence();
    }
    __syncthreads();  // the ring's barriers exist before anybody uses them
    if (threadIdx.x >= kConsumers) {
        produce(shared, args);
    } else {
        consume(shared, args);
    }
}

// --- host

static Status num_multiprocessors(int *count) {
    int device = 0;
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    return CUDA_STATUS(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

static int max_segments(int max_seq_len) {
    return (max_seq_len + kSegmentKeys - 1) / kSegmentKeys;
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
    if (p->hidden_size > kMaxHidden || p->num_heads / p->num_kv_heads > kMaxGroup ||
        p->num_layers > kMaxLayers)
        return 0;
    return sizeof(StepCounters) + candidates_bytes() + tickets_bytes(p) +
           kStepTokens * (size_t)p->num_heads * max_segments(max_seq_len) * kPartialColumns * sizeof(float);
}

extern "C" Status cuda_decode_step(const DecodeProblem *problem, const BatchIndex *batch, int advance,
                                   Stream stream) {
    char *workspace = static_cast<char *>(problem->workspace);
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
    args.segments = reinterpret_cast<float *>(workspace);
    args.max_segments = max_segments(batch->max_seq_len);
    int num_blocks = 0;
    TRY(num_multiprocessors(&num_blocks));
    TRY(CUDA_STATUS(cudaFuncSetAttribute(decode_step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         (int)sizeof(StepShared))));
    void *parameters[] = {&args};
    return CUDA_STATUS(cudaLaunchCooperativeKernel(reinterpret_cast<const void *>(decode_step_kernel),
                                                   dim3((unsigned)num_blocks), dim3(kStepThreads),
                                                   parameters, sizeof(StepShared), (cudaStream_t)stream));
}
