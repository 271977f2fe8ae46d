// decode_output.cuh -- the end of a step in the persistent decode kernel: arg-max over the grid, and the
// next step's input.

#pragma once
#include "decode_candidate.cuh"
#include "decode_step.cuh"

// Each thread's best logit of its token to the token's best of the whole grid; a warp per token.
template <typename Shared>
static __device__ __forceinline__ void argmax_phase(Shared &shared, const StepArguments &args,
                                                    Candidate own) {
    float *values = reinterpret_cast<float *>(shared.input);
    int *ids = reinterpret_cast<int *>(values + kConsumers);
    int token = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    consumer_barrier();  // the last sums are read
    values[threadIdx.x] = own.value;
    ids[threadIdx.x] = own.id;
    consumer_barrier();  // the threads' candidates visible to the warps that compare them
    if (token < args.num_seqs) {
        Candidate best = no_candidate();
        // Thread i held outputs i mod 64, so those of token t are the eight from 8 t in each 64.
#pragma unroll 1
        for (int i = lane; i < kConsumers / Shared::kTokens; i += kWarp) {
            int thread = i / kUnitRows * Shared::kOutputs + token * kUnitRows + i % kUnitRows;
            best.take_better(values[thread], ids[thread]);
        }
        best.take_best_of_warp();
        if (lane == 0) {
            args.best_values[blockIdx.x * kStepTokens + token] = best.value;
            args.best_ids[blockIdx.x * kStepTokens + token] = best.id;
            fence_gpu();  // the block's candidate is out before the block reports
        }
    }
    consumer_barrier();  // every token's
    if (threadIdx.x == 0) shared.is_last = atomicAdd(&args.counters->finished, 1) == gridDim.x - 1;
    consumer_barrier();  // the verdict visible to every thread
    if (!shared.is_last) return;
    fence_gpu();  // the other blocks' candidates after their reports
    if (token < args.num_seqs) {
        Candidate best = no_candidate();
#pragma unroll 1
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
    if (threadIdx.x == 0)
        args.counters->finished = args.counters->arrivals = args.counters->early_arrivals =
            0;  // for the next launch
}
