// decode_fold.cuh -- what becomes of an attention task's tiles in the persistent decode kernel: tiles into
// segments, segments into the row, docs/numerics.md section 4.
//
// Where a row is one run, the block folds its tiles in order. Where it has several, each leaves parts in memory,
// and the last block to finish folds the row.

#pragma once
#include "decode_task.cuh"

constexpr int kFoldColumns = 2;  // a thread folds, of a segment

// Some values of a partial result with the maximum and sum of their row.
template <int kValues>
struct FoldState {
    float max, sum, values[kValues];

    __device__ __forceinline__ void fold(const FoldState &next) {
        float largest = fmaxf(max, next.max);
        float keep = contract_exp2(__fsub_rn(max, largest)),
              take = contract_exp2(__fsub_rn(next.max, largest));
        max = largest;
        sum = __fmaf_rn(next.sum, take, __fmul_rn(sum, keep));
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            values[i] = __fmaf_rn(next.values[i], take, __fmul_rn(values[i], keep));
    }
    __device__ __forceinline__ void take_if(bool condition, const FoldState &other) {
        max = condition ? other.max : max;
        sum = condition ? other.sum : sum;
#pragma unroll
        for (int i = 0; i < kValues; ++i) values[i] = condition ? other.values[i] : values[i];
    }
    __device__ __forceinline__ bf16 result(int i) const {
        return to_bf16(__fmul_rn(values[i], __frcp_rn(sum)));
    }
};

// Where a column of head `row` of the task's group stands among the rows that O multiplies.
__device__ __forceinline__ size_t attn_place(const StepArguments &args, const AttentionTask &task,
                                             int group, int row, int column) {
    return row_place(args.num_seqs, task.sequence, (task.kv_head * group + row) * kTileCols + column,
                     args.problem.num_heads * kTileCols);
}

// What the block makes of its tiles: the result where they are the whole row, else the row's parts.
static __device__ __forceinline__ void finish_task(const AttentionShared &own, const StepArguments &args,
                                                   const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
    bool is_row = task.plan.num_runs == 1, is_folded = is_row || task.plan.is_by_segments;
#pragma unroll 1
    for (int i = own_thread(); i < group * kTileCols; i += kConsumers) {
        int row = i / kTileCols, column = i % kTileCols;
        auto tile_state = [&](int tile) -> FoldState<1> {
            const float *from = own.tiles[tile][row];
            return {from[kTileCols], from[kTileCols + 1], {from[column]}};
        };
        auto store_part = [&](int part, const FoldState<1> &state) {
            float *to = args.parts + ((size_t)(task.first_part + part) * group + row) * kPartColumns;
            to[column] = state.values[0];
            if (column == 0) to[kTileCols] = state.max;
            if (column == 1) to[kTileCols + 1] = state.sum;
        };
        auto part_of = [&](int tile) {
            return (task.first_tile + tile) / (task.plan.is_by_segments ? NUMERICS_SEGMENT : 1);
        };
        FoldState<1> state = tile_state(0);
#pragma unroll 1
        for (int t = 1; t < task.num_tiles; ++t) {
            if (is_folded && t != NUMERICS_SEGMENT) {
                state.fold(tile_state(t));
            } else {
                store_part(part_of(t - 1), state);
                state = tile_state(t);
            }
        }
        if (is_row) {
            args.problem.attn[attn_place(args, task, group, row, column)] = state.result(0);
        } else {
            store_part(part_of(task.num_tiles - 1), state);
        }
    }
}

// Segments first .. first + count - 1 of a row from its parts, each head's, into own.folds.
static __device__ __forceinline__ void fold_segments(AttentionShared &own, const StepArguments &args,
                                                     const AttentionTask &task, int first, int count,
                                                     int group) {
    constexpr int kThreadsPerRow = kTileCols / kFoldColumns;
#pragma unroll 1
    for (int i = own_thread(); i < count * group * kThreadsPerRow; i += kConsumers) {
        int segment_row = i / kThreadsPerRow, column = i % kThreadsPerRow * kFoldColumns;
        int segment = segment_row / group, first_part = (first + segment) * NUMERICS_SEGMENT;
        int num_parts = min(NUMERICS_SEGMENT, task.plan.num_parts - first_part);
        const float *from =
            args.parts +
            ((size_t)(task.first_part + first_part) * group + segment_row - segment * group) * kPartColumns;
        float2 values[NUMERICS_SEGMENT];
        float2 max_and_sum[NUMERICS_SEGMENT];
#pragma unroll
        for (int t = 0; t < NUMERICS_SEGMENT; ++t) {
            values[t] = max_and_sum[t] = make_float2(0.0f, 0.0f);
            if (t >= num_parts) continue;
            values[t] = __ldcg(reinterpret_cast<const float2 *>(from + column));
            max_and_sum[t] = __ldcg(reinterpret_cast<const float2 *>(from + kTileCols));
            from += group * kPartColumns;
        }
        auto part = [&](int t) -> FoldState<kFoldColumns> {
            return {max_and_sum[t].x, max_and_sum[t].y, {values[t].x, values[t].y}};
        };
        FoldState<kFoldColumns> state = part(0);
#pragma unroll
        for (int t = 1; t < NUMERICS_SEGMENT; ++t) {
            FoldState<kFoldColumns> next = state;
            next.fold(part(t));
            state.take_if(t < num_parts,
                          next);  // without a branch, so that the factors are computed together
        }
        float *to = own.folds[segment_row];
        *reinterpret_cast<float2 *>(to + column) = make_float2(state.values[0], state.values[1]);
        if (column == 0) to[kTileCols] = state.max, to[kTileCols + 1] = state.sum;
    }
}

// The same where each part is a segment's fold already.
static __device__ __forceinline__ void copy_segments(AttentionShared &own, const StepArguments &args,
                                                     const AttentionTask &task, int first, int count,
                                                     int group) {
    constexpr int kCopies = kPartColumns * (int)sizeof(float) / 16;  // of a head's part
    const float *from = args.parts + (size_t)(task.first_part + first) * group * kPartColumns;
    uint32_t to = shared_address(own.folds);
#pragma unroll 1
    for (int i = own_thread(); i < count * group * kCopies; i += kConsumers)
        copy_async_16(to + i * 16, from + i * 4, 16);
    copy_async_commit();
    copy_async_wait<0>();
}

// The last block to finish a row folds its parts: tiles into segments, segments into the row.
template <typename Shared>
static __device__ __forceinline__ void finish_row(Shared &shared, const StepArguments &args,
                                                  const AttentionTask &task) {
    int group = args.problem.num_heads / args.problem.num_kv_heads;
    consumer_barrier();  // every thread's share of this block's parts
    if (own_thread() == 0) {
        unsigned *ticket = args.tickets + task.sequence * args.problem.num_kv_heads + task.kv_head;
        // This block's parts are out before its ticket, the other blocks' are read after theirs.
        shared.is_last = add_acquire_release(ticket, 1) == (unsigned)task.plan.num_runs - 1;
        if (shared.is_last) *ticket = 0;
    }
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
    int per_segment = task.plan.is_by_segments ? 1 : NUMERICS_SEGMENT;
    int num_segments = (task.plan.num_parts + per_segment - 1) / per_segment;
    int at_once = kFoldRows / group;  // segments
    int column = own_thread() % (kTileCols / 2) * 2, own_row = own_thread() / (kTileCols / 2);
    FoldState<2> row = {};
#pragma unroll 1
    for (int first = 0; first < num_segments; first += at_once) {
        int count = min(at_once, num_segments - first);
        if (task.plan.is_by_segments) {
            copy_segments(shared.attention, args, task, first, count, group);
        } else {
            fold_segments(shared.attention, args, task, first, count, group);
        }
        consumer_barrier();  // the segments visible to the threads that fold them
        if (own_row < group) {
#pragma unroll 1
            for (int s = 0; s < count; ++s) {
                const float *from = shared.attention.folds[s * group + own_row];
                FoldState<2> segment = {
                    from[kTileCols], from[kTileCols + 1], {from[column], from[column + 1]}};
                if (first + s == 0) {
                    row = segment;
                } else {
                    row.fold(segment);
                }
            }
        }
        if (first + at_once < num_segments) consumer_barrier();  // they are read
    }
    if (own_row >= group) return;
    *reinterpret_cast<uint32_t *>(args.problem.attn + attn_place(args, task, group, own_row, column)) =
        row.result(0) | (uint32_t)row.result(1) << 16;
}
