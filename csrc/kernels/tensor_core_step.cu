// tensor_core_step.cu -- the k16 step as the hardware does it, one at a time, so that it can be proved.
//
//   d[i] = step(c[i], a[i, 0..15], b[i, 0..15])
//
// Shapes    a, b [n, 16] bf16; c, d [n] float32
// Rounding  the instruction's own: docs/numerics.md section 1
// Mapping   one warp per eight steps: step i is the diagonal element (i, i) of one mma.sync tile
// Cost      one instruction per eight outputs, 120 of its 128 results thrown away: a proof, not a path
// See       twin/tensor_core.c, tests/kernels/test_bits_tensor_core_step.py, tests/hardware/mma_dump.cu

#include "../common/cuda_status.h"
#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kStepsPerWarp = 8;  // columns of the tile, hence the length of its diagonal
constexpr int kWarps = 8;         // per thread block
constexpr int kStepsPerBlock = kStepsPerWarp * kWarps;

static __global__ void tensor_core_step_kernel(float *d, const float *c, const bf16 *a, const bf16 *b,
                                               int64_t n) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int group = lane / 4, quad = lane % 4;
    int64_t step = (int64_t)blockIdx.x * kStepsPerBlock + warp * kStepsPerWarp + group;
    bool exists = step < n;
    uint32_t a_fragment[4] = {0, 0, 0, 0};  // rows 8 .. 15 stay zero
    uint32_t b_fragment[2] = {0, 0};
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    bool on_diagonal = group / 2 == quad;  // this lane holds columns 2 quad and 2 quad + 1 of row `group`
    if (exists) {
        const bf16 *a_row = a + step * NUMERICS_STEP, *b_row = b + step * NUMERICS_STEP;
        a_fragment[0] = load_pair(a_row + 2 * quad);
        a_fragment[2] = load_pair(a_row + 2 * quad + 8);
        b_fragment[0] = load_pair(b_row + 2 * quad);
        b_fragment[1] = load_pair(b_row + 2 * quad + 8);
        if (on_diagonal) sum[0] = sum[1] = c[step];  // the neighbour's result is not stored
    }
    mma_m16n8k16(sum, a_fragment, b_fragment[0], b_fragment[1]);
    if (exists && on_diagonal) d[step] = group % 2 == 0 ? sum[0] : sum[1];
}

extern "C" Status cuda_tensor_core_step(float *d, const float *c, const bf16 *a, const bf16 *b, int64_t n,
                                        Stream stream) {
    if (n == 0) return STATUS_OK;
    int64_t num_blocks = (n + kStepsPerBlock - 1) / kStepsPerBlock;
    tensor_core_step_kernel<<<(unsigned)num_blocks, kWarps * kWarp, 0, (cudaStream_t)stream>>>(d, c, a, b,
                                                                                               n);
    return CUDA_STATUS(cudaGetLastError());
}
