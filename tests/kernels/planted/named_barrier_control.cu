// named_barrier_control.cu -- not planted: correct. Values handed from warp to warp by named barriers of part
// of a thread block, with the engine's own instructions. What racecheck reports here is racecheck's limit.
//
//   meet           twelve of sixteen warps: eight write, all meet, all read, all meet
//   announce       the same, and in every round they announce at two barriers without waiting (bar.arrive)
//                  while two warps wait there, which then announce at others: decode_step_kernel's grid barrier
//   tile           four warps share a piece of a ring: the last patches a row, all meet, all read, all meet,
//                  the first gives the slot back and a bulk copy fills it
//   tile-announce  the same beside such announcements
//   apart          announce without the meetings: wrong on purpose
//   tile-apart     tile-announce without the meetings: wrong on purpose
//
// Prints "right" or "wrong" and returns 1 where the sum is wrong (the last two may be anything).

#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>
#include "async_copy.cuh"
#include "ptx.cuh"

constexpr uint32_t kFullWarp = 0xffffffff;
constexpr int kWarp = 32, kConsumerWarps = 12, kConsumers = kConsumerWarps * kWarp;
constexpr int kThreads = kConsumers + 4 * kWarp, kBlocks = 32, kRounds = 24, kWriters = 8;
constexpr int kTileWarps = 4, kTiles = kConsumerWarps / kTileWarps, kSlots = 2 * kTiles;
constexpr int kPieceBytes = 512, kPieceWords = kPieceBytes / 4, kPatchedWords = 4;
constexpr int kMeet = 1, kStores = 3, kArrived = 4, kEarlyStores = 5, kEarly = 6, kTileMeets = 7;

enum Mode { kPlainMeet, kAnnounce, kTile, kTileAnnounce, kApart, kTileApart, kNumModes };
const char *const kNames[] = {"meet", "announce", "tile", "tile-announce", "apart", "tile-apart"};

struct Shared {
    alignas(128) uint32_t ring[kSlots][kPieceWords];
    alignas(16) uint32_t sums[kWriters];
    uint32_t flag;
    uint64_t full[kSlots];
    uint64_t empty[kSlots];
};

template <int kStoresAt, int kArrivedAt>
static __device__ void keep(int rounds) {
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        named_barrier_sync<kStoresAt, kConsumers + kWarp>();
        if (threadIdx.x % kWarp == 0) __nanosleep(200);
        __syncwarp();
        named_barrier_arrive<kArrivedAt, kConsumers + kWarp>();
    }
}

static __device__ void announce() {
    named_barrier_arrive<kEarlyStores, kConsumers + kWarp>();
    named_barrier_arrive<kStores, kConsumers + kWarp>();
    named_barrier_sync<kEarly, kConsumers + kWarp>();
    named_barrier_sync<kArrived, kConsumers + kWarp>();
}

static __device__ uint32_t meet_round(Shared &shared, uint32_t value, bool is_meeting) {
    int thread = (int)threadIdx.x, warp = thread / kWarp;
    uint32_t sum = 0;
    if (warp < kWriters) {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2)
            value += __shfl_xor_sync(kFullWarp, value, offset);
        if (thread % kWarp == 0) shared.sums[warp] = value;
    }
    if (thread == 0) shared.flag = value;
    if (is_meeting) named_barrier_sync<kMeet, kConsumers>();  // the sums visible to every warp
    volatile uint32_t *sums = shared.sums;
    for (int i = 0; i < kWriters; ++i) sum += sums[i];
    sum += *(volatile uint32_t *)&shared.flag;
    if (is_meeting) named_barrier_sync<kMeet, kConsumers>();  // they are read
    return sum;
}

static __device__ uint32_t tile_round(Shared &shared, int round, bool is_meeting) {
    int thread = (int)threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    int place = warp / kTileWarps, share = warp % kTileWarps, piece = round * kTiles + place;
    uint32_t *words = shared.ring[piece % kSlots], part[4];
    barrier_wait(shared_address(&shared.full[piece % kSlots]), piece / kSlots & 1);
    if (share == kTileWarps - 1) {
        if (lane < kPatchedWords) words[lane] = (uint32_t)(piece + lane);
        __syncwarp();         // the row is in before any lane reads it
        fence_async_proxy();  // and before the copy that fills the piece again
    }
    if (is_meeting) named_barrier_sync<kTileWarps * kWarp>(kTileMeets + place);  // the patched row
    load_matrix_x4(part, shared_address(words) + lane * 16);
    if (is_meeting) named_barrier_sync<kTileWarps * kWarp>(kTileMeets + place);  // every warp has read
    if (share == 0 && lane == 0) barrier_arrive(shared_address(&shared.empty[piece % kSlots]));
    return part[0] + part[1] + part[2] + part[3];
}

static __device__ void produce(Shared &shared, const uint32_t *in) {
    if (threadIdx.x % kWarp) return;
#pragma unroll 1
    for (int piece = 0; piece < kRounds * kTiles; ++piece) {
        int slot = piece % kSlots;
        uint32_t full = shared_address(&shared.full[slot]);
        barrier_wait(shared_address(&shared.empty[slot]), piece / kSlots & 1 ^ 1);
        barrier_arrive_expect(full, kPieceBytes);
        copy_bulk(shared_address(shared.ring[slot]), in + (size_t)piece * kPieceWords, kPieceBytes, full);
    }
}

static __global__ void named_barrier_control_kernel(uint32_t *out, const uint32_t *in, Mode mode) {
    __shared__ Shared shared;
    int thread = (int)threadIdx.x, warp = thread / kWarp;
    bool is_tile = mode == kTile || mode == kTileAnnounce || mode == kTileApart;
    bool is_meeting = mode != kApart && mode != kTileApart;
    bool is_announcing = mode != kPlainMeet && mode != kTile;
    if (thread < kSlots) {
        barrier_init(shared_address(&shared.full[thread]), 1);
        barrier_init(shared_address(&shared.empty[thread]), 1);
        barrier_init_fence();
    }
    __syncthreads();  // the ring's barriers exist before anybody uses them
    if (warp >= kConsumerWarps) {
        if (warp == kConsumerWarps && is_tile) produce(shared, in);
        if (warp == kConsumerWarps + 1 && is_announcing) keep<kStores, kArrived>(kRounds);
        if (warp == kConsumerWarps + 2 && is_announcing) keep<kEarlyStores, kEarly>(kRounds);
        return;
    }
    uint32_t sum = 0;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        sum += is_tile ? tile_round(shared, round, is_meeting)
                       : meet_round(shared, (uint32_t)(round + thread), is_meeting);
        if (is_announcing) announce();
    }
    out[blockIdx.x * kConsumers + thread] = sum;
}

// What every thread of a warp adds up to, by the host.
static uint32_t expected_of(int warp, bool is_tile, const uint32_t *in) {
    uint32_t sum = 0;
    for (int round = 0; round < kRounds; ++round) {
        if (is_tile) {
            int piece = round * kTiles + warp / kTileWarps;
            for (int i = 0; i < kPieceWords; ++i)
                sum += i < kPatchedWords ? (uint32_t)(piece + i) : in[piece * kPieceWords + i];
            continue;
        }
        for (int thread = 0; thread < kWriters * kWarp; ++thread)
            sum += (uint32_t)(kWarp * (round + thread)) * (thread < kWarp ? 2 : 1);
    }
    return sum;
}

int main(int count, char **words) {
    constexpr int kWords = kRounds * kTiles * kPieceWords, kOutputs = kBlocks * kConsumers;
    static uint32_t host[kWords], sums[kOutputs];
    int mode = 0;
    while (mode < kNumModes && (count < 2 || strcmp(words[1], kNames[mode]) != 0)) ++mode;
    if (mode == kNumModes) return 2;
    for (int i = 0; i < kWords; ++i) host[i] = (uint32_t)(i * 37 % 61);
    uint32_t *in, *out;
    if (cudaMalloc(&in, sizeof host) != cudaSuccess || cudaMalloc(&out, sizeof sums) != cudaSuccess)
        return 2;
    if (cudaMemcpy(in, host, sizeof host, cudaMemcpyHostToDevice) != cudaSuccess) return 2;
    named_barrier_control_kernel<<<kBlocks, kThreads>>>(out, in, (Mode)mode);
    if (cudaMemcpy(sums, out, sizeof sums, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
    bool is_tile = mode == kTile || mode == kTileAnnounce || mode == kTileApart, is_right = true;
    for (int i = 0; i < kOutputs; i += kWarp) {
        uint32_t sum = 0;
        for (int lane = 0; lane < kWarp; ++lane) sum += sums[i + lane];
        is_right = is_right && sum == expected_of(i % kConsumers / kWarp, is_tile, host);
    }
    printf("%s: %s\n", kNames[mode], is_right ? "right" : "wrong");
    (void)cudaFree(in);
    (void)cudaFree(out);
    return is_right || mode >= kApart ? 0 : 1;
}
