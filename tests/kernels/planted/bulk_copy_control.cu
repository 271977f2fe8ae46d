// bulk_copy_control.cu -- not planted: correct. Bulk copies into shared memory, read after the mbarrier
// that counts their bytes, with the engine's own instructions. What racecheck reports here is racecheck's
// limit.
//
//   out[i] = sum over pieces of in[piece][i]
//
//   once    one piece, one barrier, one use: no slot is ever written twice
//   ring    pieces through two slots, each given back by an `empty` barrier, as in decode_stream.cuh: one
//           lane arrives for its warp, after __syncwarp()
//   arrive  the same, every reading lane arrives for itself
//   plain   the same as ring, read by ordinary loads
//   lanes   a ring whose pieces are copied by four lanes after one lane told the bytes
//   patch   a ring into whose pieces the reading warp writes a row of its own before it reads, as attention
//           does with the step's new key: a proxy fence stands between that write and the copy that follows
//   init    two arrays of barriers, initialised by the first 44 and the first 22 threads, beside members
//   that
//           lanes of other warps write meanwhile: the start of decode_step_kernel. The compiler predicates
//           the second array's instruction off for threads 22 to 43, whose address register still holds the
//           first array's; racecheck counts it as executed, 22 barriers behind the array's end
//   unordered   the ring, read before the wait for the bytes: wrong on purpose, for comparison
//
// Prints "right" or "wrong" and returns 1 where the sum is wrong (`unordered` may be anything).

#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>
#include "async_copy.cuh"
#include "ptx.cuh"

constexpr int kWarp = 32, kWarps = 6;
constexpr int kRows = 8, kRowBytes = 16, kTiles = 4;  // ldmatrix: four 8 x 8 tiles of 2 bytes
constexpr int kPieceBytes = kTiles * kRows * kRowBytes;
constexpr int kPieces = 8, kSlots = 2, kCopyLanes = 4;
constexpr int kFull = 44, kEmpty = 22, kOrders = 5;  // as the engine's ring has

enum Mode { kOnce, kRing, kArrive, kPlain, kLanes, kPatch, kInit, kUnordered, kNumModes };
const char *const kNames[] = {"once", "ring", "arrive", "plain", "lanes", "patch", "init", "unordered"};

constexpr uint32_t kPatched = 7;

struct Shared {
    alignas(128) unsigned char ring[kSlots][kPieceBytes];
    uint64_t full[kSlots];
    uint64_t empty[kSlots];
};

struct Order {
    int values[6];
};

struct InitShared {
    alignas(1024) unsigned char ring[kPieceBytes];
    uint64_t full[kFull];
    uint64_t empty[kEmpty];
    Order orders[kOrders];
    unsigned counter;
};

static __device__ void produce(Shared &shared, const unsigned char *in, Mode mode, int pieces) {
    int lane = (int)threadIdx.x % kWarp;
    for (int piece = 0; piece < pieces; ++piece) {
        int slot = piece % kSlots, turn = piece / kSlots;
        uint32_t full = shared_address(&shared.full[slot]), to = shared_address(shared.ring[slot]);
        const unsigned char *from = in + (size_t)piece * kPieceBytes;
        barrier_wait(shared_address(&shared.empty[slot]), turn & 1 ^ 1);
        if (lane == 0) barrier_arrive_expect(full, kPieceBytes);
        __syncwarp();  // the bytes are expected before the first arrive
        int lanes = mode == kLanes ? kCopyLanes : 1, bytes = kPieceBytes / lanes;
        if (lane < lanes) copy_bulk(to + lane * bytes, from + lane * bytes, bytes, full);
        __syncwarp();  // one order of the warp's lanes in every turn
    }
}

static __device__ void patch_piece(Shared &shared, int slot) {
    int lane = (int)threadIdx.x;
    reinterpret_cast<uint32_t *>(shared.ring[slot])[lane] = kPatched;
    fence_async_proxy();  // this write comes before the copy that fills the slot again
    __syncwarp();         // the row is in before any lane reads it
}

static __device__ void read_piece(uint32_t (&part)[4], const Shared &shared, int slot, Mode mode) {
    int lane = (int)threadIdx.x;
    if (mode == kPlain) {
        const uint32_t *words = reinterpret_cast<const uint32_t *>(shared.ring[slot]);
        for (int i = 0; i < 4; ++i) part[i] = words[i * kWarp + lane];
    } else {
        load_matrix_x4(part, shared_address(shared.ring[slot]) + lane * kRowBytes);
    }
}

static __device__ void consume(Shared &shared, uint32_t *out, Mode mode, int pieces) {
    int lane = (int)threadIdx.x;
    uint32_t sums[4] = {0, 0, 0, 0}, part[4];
    for (int piece = 0; piece < pieces; ++piece) {
        int slot = piece % kSlots;
        uint32_t full = shared_address(&shared.full[slot]);
        uint32_t empty = shared_address(&shared.empty[slot]);
        if (mode == kUnordered) read_piece(part, shared, slot, mode);
        barrier_wait(full, piece / kSlots & 1);
        if (mode == kPatch) patch_piece(shared, slot);
        if (mode != kUnordered) read_piece(part, shared, slot, mode);
        for (int i = 0; i < 4; ++i) sums[i] += part[i];
        __syncwarp();  // every lane has read before one lane gives the slot back
        if (mode == kArrive || lane == 0) barrier_arrive(empty);
    }
    for (int i = 0; i < 4; ++i) out[i * kWarp + lane] = sums[i];
}

static __global__ void bulk_copy_control_kernel(uint32_t *out, const unsigned char *in, Mode mode,
                                                int pieces) {
    __shared__ Shared shared;
    int thread = (int)threadIdx.x, warp = thread / kWarp;
    if (thread < kSlots) {
        barrier_init(shared_address(&shared.full[thread]), 1);
        barrier_init(shared_address(&shared.empty[thread]), mode == kArrive ? kWarp : 1);
        barrier_init_fence();
    }
    __syncthreads();  // the barriers exist before anybody uses them
    if (thread >= kWarp) {
        if (warp == kWarps - 1) produce(shared, in, mode, pieces);
        return;
    }
    consume(shared, out, mode, pieces);
}

// Writes what it finds in the orders, and a 1 for each barrier that is in its first phase.
static __global__ void barrier_init_control_kernel(int *out) {
    extern __shared__ unsigned char raw[];
    InitShared &shared = *reinterpret_cast<InitShared *>(raw);
    int thread = (int)threadIdx.x;
    if (thread < kFull) barrier_init(shared_address(&shared.full[thread]), 1);
    if (thread < kEmpty) barrier_init(shared_address(&shared.empty[thread]), 1);
    if (thread < kFull) barrier_init_fence();
    if (thread == 0) shared.counter = 0;
    int warp = thread / kWarp;
    if (warp < kOrders && thread % kWarp == 0) {
        for (int i = 0; i < 6; ++i) shared.orders[warp].values[i] = thread + i;
    }
    __syncthreads();  // the barriers and the orders exist before anybody uses them
    if (thread < kOrders * 6) out[thread] = shared.orders[thread / 6].values[thread % 6];
    if (thread < kEmpty) barrier_arrive(shared_address(&shared.empty[thread]));
    __syncthreads();  // every barrier has its one arrival
    if (thread < kEmpty) barrier_wait(shared_address(&shared.empty[thread]), 0);
    if (thread == 0) out[kOrders * 6] = (int)shared.counter + 1;
}

static int run_init(void) {
    constexpr int kValues = kOrders * 6 + 1;
    int found[kValues], *out;
    if (cudaMalloc(&out, sizeof found) != cudaSuccess) return 2;
    barrier_init_control_kernel<<<1, kWarps * kWarp, sizeof(InitShared)>>>(out);
    if (cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
    bool is_right = found[kValues - 1] == 1;
    for (int i = 0; i < kValues - 1; ++i) is_right = is_right && found[i] == i / 6 * kWarp + i % 6;
    printf("init: %s\n", is_right ? "right" : "wrong");
    (void)cudaFree(out);
    return is_right ? 0 : 1;
}

int main(int count, char **words) {
    int mode = 0;
    while (mode < kNumModes && (count < 2 || strcmp(words[1], kNames[mode]) != 0)) ++mode;
    if (mode == kNumModes) return 2;
    if (mode == kInit) return run_init();
    int pieces = mode == kOnce ? 1 : kPieces;
    static unsigned char host[kPieces * kPieceBytes];
    uint32_t sums[4 * kWarp], expected[4 * kWarp] = {0};
    for (int i = 0; i < pieces * kPieceBytes; ++i) host[i] = (unsigned char)(i * 37 % 61);
    for (int piece = 0; piece < pieces; ++piece) {
        for (int i = 0; i < 4 * kWarp; ++i) {
            uint32_t word;
            memcpy(&word, host + piece * kPieceBytes + i * 4, 4);
            expected[i] += mode == kPatch && i < kWarp ? kPatched : word;
        }
    }
    unsigned char *in;
    uint32_t *out;
    if (cudaMalloc(&in, sizeof host) != cudaSuccess || cudaMalloc(&out, sizeof sums) != cudaSuccess)
        return 2;
    if (cudaMemcpy(in, host, sizeof host, cudaMemcpyHostToDevice) != cudaSuccess) return 2;
    bulk_copy_control_kernel<<<1, kWarps * kWarp>>>(out, in, (Mode)mode, pieces);
    if (cudaMemcpy(sums, out, sizeof sums, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
    bool is_right = memcmp(sums, expected, sizeof sums) == 0;
    printf("%s: %s\n", kNames[mode], is_right ? "right" : "wrong");
    (void)cudaFree(in);
    (void)cudaFree(out);
    return is_right || mode == kUnordered ? 0 : 1;
}
