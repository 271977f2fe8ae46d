// edit_logits.cu -- what the request and its own tokens do to single logits before the choice.
//
//   x = logit + bias;  seen: x > 0 ? x / repetition : x * repetition;  x - count * frequency;
//   count > 0: x - presence;  banned: -inf
//
// Shapes    logits [num_rows, vocab_size] float32, edits [num_edits]
// Rounding  each operation to float32, docs/numerics.md section 8
// Mapping   one thread per edit; no two edits have the same logit
// Cost      one scattered read and write per edit
// See       twin/edit_logits.c, tests/kernels/test_bits_sample.py

#include "../common/cuda_status.h"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // edits are many and small: enough blocks to fill the device

static __global__ void edit_logits_kernel(float *logits, float *saved, const LogitEdit *edits,
                                          const SampleRow *rows, int num_edits, int vocab_size) {
    int i = (int)(blockIdx.x * kThreads + threadIdx.x);
    if (i >= num_edits) return;
    LogitEdit edit = edits[i];
    const SampleRow &row = rows[edit.row];
    float *logit = logits + (size_t)edit.row * vocab_size + edit.token_id;
    saved[i] = *logit;
    float x = __fadd_rn(*logit, edit.bias);
    if (edit.flags & EDIT_SEEN)
        x = x > 0.0f ? __fdiv_rn(x, row.repetition_penalty) : __fmul_rn(x, row.repetition_penalty);
    x = __fsub_rn(x, __fmul_rn((float)edit.count, row.frequency_penalty));
    if (edit.count > 0) x = __fsub_rn(x, row.presence_penalty);
    *logit = edit.flags & EDIT_BANNED ? __int_as_float(0xff800000) : x;
}

static __global__ void restore_logits_kernel(float *logits, const float *saved, const LogitEdit *edits,
                                             int num_edits, int vocab_size) {
    int i = (int)(blockIdx.x * kThreads + threadIdx.x);
    if (i < num_edits) logits[(size_t)edits[i].row * vocab_size + edits[i].token_id] = saved[i];
}

extern "C" Status cuda_edit_logits(float *logits, float *saved, const LogitEdit *edits,
                                   const SampleRow *rows, int num_edits, int vocab_size, Stream stream) {
    if (num_edits == 0) return STATUS_OK;
    edit_logits_kernel<<<(num_edits - 1) / kThreads + 1, kThreads, 0, (cudaStream_t)stream>>>(
        logits, saved, edits, rows, num_edits, vocab_size);
    return CUDA_STATUS(cudaGetLastError());
}

extern "C" Status cuda_restore_logits(float *logits, const float *saved, const LogitEdit *edits,
                                      int num_edits, int vocab_size, Stream stream) {
    if (num_edits == 0) return STATUS_OK;
    restore_logits_kernel<<<(num_edits - 1) / kThreads + 1, kThreads, 0, (cudaStream_t)stream>>>(
        logits, saved, edits, num_edits, vocab_size);
    return CUDA_STATUS(cudaGetLastError());
}
