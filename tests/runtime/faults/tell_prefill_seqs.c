// tell_prefill_seqs.c -- no fault: opens batch_prefill_seqs to a test, as only kernels on a GPU read its list.

#include "../../../csrc/runtime/batch.h"

__attribute__((visibility("default"))) int tell_prefill_seqs(const int32_t *cu_seqlens_q, int num_seqs,
                                                             int32_t *seqs) {
    EngineBatch batch = {.cu_seqlens_q = cu_seqlens_q, .num_seqs = num_seqs};
    return batch_prefill_seqs(&batch, seqs);
}
