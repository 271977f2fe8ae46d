// decode_norm.cuh -- RMSNorm in the persistent decode kernel: of all tokens, in every cluster of blocks,
// before the phases that multiply normalised rows.

#pragma once
#include "decode_step.cuh"

// sum / count, rounded; where count is a power of two, by a product: the same exact value, rounded once too.
__device__ __forceinline__ float mean_of(float sum, int count) {
    if ((count & (count - 1)) != 0) return __fdiv_rn(sum, (float)count);
    return __fmul_rn(sum, __int_as_float((127 - 31 + __clz(count)) << 23));
}

// RMSNorm of all tokens into shared.input, docs/numerics.md section 5. A warp works on 256 columns, 32 of the
// contract's lanes, of one token at a time; the cluster's blocks tell each other their sums of squares. The
// weight is the stream's next piece.
template <typename Shared>
static __device__ __forceinline__ void norm_phase(Shared &shared, int &piece, int phase,
                                                  const bf16 *residual, int hidden, float eps,
                                                  int num_tokens) {
    constexpr int kGroupCols = kWarp * kVector, kPerChunk = NUMERICS_CHUNK / kGroupCols;
    constexpr int kOwnGroups = kNormGroups / Shared::kCluster;
    constexpr int kTasks = (Shared::kTokens * kOwnGroups + kConsumerWarps - 1) / kConsumerWarps;
    static_assert(kNormGroups % (Shared::kCluster * kPerChunk) == 0, "a block has whole chunks");
    int warp = own_thread() / kWarp, lane = own_thread() % kWarp;
    // Of the warp's task i: its token, group of columns in the row, column in the row and in shared.input.
    auto token_of = [&](int i) { return (warp + i * kConsumerWarps) / kOwnGroups; };
    auto own_group = [&](int i) { return (warp + i * kConsumerWarps) % kOwnGroups; };
    auto group_of = [&](int i) {
        return chunk_of<Shared>(own_group(i) / kPerChunk) * kPerChunk + own_group(i) % kPerChunk;
    };
    auto column_of = [&](int i) { return group_of(i) * kGroupCols + lane * kVector; };
    uint32_t here = shared_address(&shared.norm_here);
    if (Shared::kCluster > 1 && own_thread() == 0)
        barrier_arrive_expect(here, num_tokens * (kNormGroups - kOwnGroups) * (int)sizeof(float));
    uint4 values[kTasks];
#pragma unroll
    for (int i = 0; i < kTasks; ++i) {
        values[i] = make_uint4(0, 0, 0, 0);
        if (token_of(i) < num_tokens && column_of(i) < hidden)
            values[i] = load_fresh_vector(residual + (size_t)token_of(i) * hidden + column_of(i));
    }
#pragma unroll
    for (int i = 0; i < kTasks; ++i) {
        float x[kVector], sum = 0.0f;
        unpack(x, values[i]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum = __fadd_rn(sum, __fmul_rn(x[j], x[j]));
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2)
            sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, offset));
        if (lane >= Shared::kCluster || token_of(i) >= num_tokens) continue;
        float *to = &shared.norm_sums[token_of(i)][group_of(i)];
        if (lane == own_rank<Shared>()) {
            *to = sum;
        } else {
            store_async_4(map_shared(shared_address(to), lane), sum, map_shared(here, lane));
        }
    }
    consumer_barrier();  // the sums of all groups visible to every warp
    if (Shared::kCluster > 1) barrier_wait(here, phase == kPhaseGateUp);  // the second norm of each layer
    // The eight group sums by xor 4, 2, 1, and the scale, of token lane % 8.
    const float *s = shared.norm_sums[lane % Shared::kTokens];
    float sum = __fadd_rn(__fadd_rn(__fadd_rn(s[0], s[4]), __fadd_rn(s[2], s[6])),
                          __fadd_rn(__fadd_rn(s[1], s[5]), __fadd_rn(s[3], s[7])));
    float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(mean_of(sum, hidden), eps)));
    wait_for_piece(shared, piece);
    const bf16 *weight = reinterpret_cast<const bf16 *>(slot_of(shared, piece));
#pragma unroll
    for (int i = 0; i < kTasks; ++i) {
        if (token_of(i) >= num_tokens) break;
        float own_scale = __shfl_sync(kFullWarp, scale, token_of(i)), x[kVector], w[kVector];
        if (column_of(i) >= hidden) continue;
        unpack(x, values[i]);
        unpack(w, load_vector(weight + column_of(i)));
#pragma unroll
        for (int j = 0; j < kVector; j += 2) {
            uint32_t pair = pack_bf16(__fmul_rn(x[j], own_scale), __fmul_rn(x[j + 1], own_scale));
            x[j] = __fmul_rn(w[j], low_float(pair));
            x[j + 1] = __fmul_rn(w[j + 1], high_float(pair));
        }
        int own_chunk = own_group(i) / kPerChunk;
        int place = place_in_chunk(token_of(i), column_of(i) % NUMERICS_CHUNK,
                                   chunk_width(hidden, chunk_of<Shared>(own_chunk)));
        store_vector(shared.input + own_chunk * num_tokens * NUMERICS_CHUNK + place, pack(x));
    }
    consumer_barrier();  // the normalised rows visible to every warp, the weight read by all
    if (own_thread() == 0) release_piece(shared, piece);
    ++piece;
}
