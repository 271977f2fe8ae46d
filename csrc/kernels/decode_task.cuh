// decode_task.cuh -- how the attention of a step is dealt to the blocks of the persistent decode kernel.
//
// A row is the attention of one sequence by one kv head; long ones are cut into runs of tiles. A task is one
// run: a block's, or where there are few the blocks' of a cluster together.

#pragma once
#include "decode_step.cuh"

__device__ __forceinline__ int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

// How many blocks share a task: a cluster's, where each cluster has one task at most.
template <int kCluster>
static __device__ __forceinline__ int attention_team(const StepArguments &args) {
    int least_tasks = 0;
#pragma unroll 1
    for (int i = 0; i < args.num_seqs; ++i)
        least_tasks += ceil_div(args.seq_lens[i], kSegmentKeys) * args.problem.num_kv_heads;
    return least_tasks * kCluster <= (int)gridDim.x ? kCluster : 1;
}

// The same for every kv head of a sequence.
static __device__ __forceinline__ RowPlan plan_row(const StepArguments &args, int sequence, int team) {
    auto num_tiles = [&](int i) { return ceil_div(args.seq_lens[i], NUMERICS_TILE); };
    int tiles = num_tiles(sequence), teams = (int)gridDim.x / team, num_tasks = teams + 1;
    int share = min(kLeastRun * team, NUMERICS_SEGMENT) - 1;
    if (tiles <= NUMERICS_SEGMENT) return {1, tiles, 0, 0, false};
    auto num_runs = [&](int row_tiles) {
        return row_tiles <= NUMERICS_SEGMENT
                   ? 1
                   : max(row_tiles / share, ceil_div(row_tiles, NUMERICS_SEGMENT));
    };
    // The shortest runs of which no team has two.
    while (share < NUMERICS_SEGMENT && num_tasks > teams) {
        num_tasks = 0;
        ++share;
#pragma unroll 1
        for (int i = 0; i < args.num_seqs; ++i)
            num_tasks += num_runs(num_tiles(i)) * args.problem.num_kv_heads;
    }
    if (share == NUMERICS_SEGMENT) {
        int segments = ceil_div(tiles, NUMERICS_SEGMENT);
        // A last segment of one tile goes to the block of the one before, if the row stays cut.
        bool is_joined = tiles % NUMERICS_SEGMENT == 1 && segments > 2;
        return {segments - is_joined, NUMERICS_SEGMENT, 0, segments, true};
    }
    int runs = num_runs(tiles);
    return {runs, tiles / runs, tiles % runs, tiles, false};
}

// One segment or less of one sequence's attention by one kv head: a cluster's task, whose tiles its blocks
// take by turns; the first of them folds them.
struct AttentionTask {
    int sequence, kv_head;
    int position;  // of the new token
    int first_tile, num_tiles;
    int first_part;  // of the row
    RowPlan plan;

    // Of the task's tiles this block has each `team`th, and as many:
    int team, rank, own_tiles;
    // The number of one of them in the row.
    __device__ int tile_of(int own_tile) const { return first_tile + own_tile * team + rank; }
    // Keys of a tile that are in the cache already, 0 .. 128.
    __device__ int cached_keys(int tile) const {
        return min(NUMERICS_TILE, position - tile * NUMERICS_TILE);
    }
    // Those and the new key.
    __device__ int num_keys(int tile) const {
        return min(NUMERICS_TILE, position - tile * NUMERICS_TILE + 1);
    }
    // Pieces of K, and of V, of a tile; one that holds the new key alone is empty on arrival.
    __device__ int halves(int tile) const { return (num_keys(tile) + kPieceKeys - 1) / kPieceKeys; }
};

// This block's first task, before whatever comes of it: the same in every layer.
template <typename Shared>
static __device__ __forceinline__ TaskCursor first_task_cursor(const Shared &shared,
                                                               const StepArguments &args) {
    int heads = args.problem.num_kv_heads, cluster = (int)blockIdx.x / Shared::kCluster;
    TaskCursor at = {};
    // The last clusters first: of weight rows they have the fewest.
    at.next = Shared::kCluster == 1 || shared.team == 1 ? (int)(gridDim.x - 1 - blockIdx.x)
                                                        : (int)gridDim.x / Shared::kCluster - 1 - cluster;
#pragma unroll 1
    for (; at.sequence < args.num_seqs; ++at.sequence) {
        const RowPlan &plan = shared.plans[at.sequence];
        if (at.next < plan.num_runs * heads) break;
        at.next -= plan.num_runs * heads;
        at.first_part += heads * plan.num_parts;
    }
    return at;
}

// Calls visit(task) for each task of this block, from `at` on, in one order for the producer and the
// consumers.
template <typename Shared, typename Visit>
static __device__ __forceinline__ void for_own_tasks(const Shared &shared, const StepArguments &args,
                                                     TaskCursor at, Visit visit) {
    int team = Shared::kCluster == 1 ? 1 : shared.team, heads = args.problem.num_kv_heads;
    int teams = team == 1 ? (int)gridDim.x : (int)gridDim.x / Shared::kCluster;
    int rank = team == 1 ? 0 : own_rank<Shared>();
#pragma unroll 1
    for (; at.sequence < args.num_seqs; ++at.sequence) {
        RowPlan plan = shared.plans[at.sequence];
        int num_tasks = plan.num_runs * heads;
#pragma unroll 1
        for (; at.next < num_tasks; at.next += teams) {
            AttentionTask task;
            int run = plan.num_runs == 1 ? 0 : at.next / heads;
            task.sequence = at.sequence;
            task.kv_head = at.next - run * heads;
            task.position = shared.positions[at.sequence];
            task.first_tile = plan.first_tile(run);
            int all_tiles = task.position / NUMERICS_TILE + 1;
            task.num_tiles =
                (run == plan.num_runs - 1 ? all_tiles : plan.first_tile(run + 1)) - task.first_tile;
            task.first_part = at.first_part + task.kv_head * plan.num_parts;
            task.plan = plan;
            task.team = team;
            task.rank = rank;
            task.own_tiles = team == 1 ? task.num_tiles
                                       : (task.num_tiles + Shared::kCluster - 1 - rank) / Shared::kCluster;
            visit(task);
        }
        at.next -= num_tasks;
        at.first_part += heads * plan.num_parts;
    }
}
