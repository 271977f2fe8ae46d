// decoding_rows.cuh -- attention for those sequences of a mixed step that have one new token.
//
// The kernel is that of a decode batch (decode_batch_attention.cu); attention.cu calls it.

#pragma once
#include "../common/cuda_status.h"
extern "C" {
#include "kernels.h"
}

// Whether there are enough of them, and it takes such a model; batch.prefill_seqs must tell them apart.
bool serves_decoding_rows(const KvLayer &cache, const BatchIndex &batch, int num_heads);
Status launch_decoding_rows(bf16 *out,      // [num_tokens, num_heads, head_dim]: their rows are written
                            const bf16 *q,  // [num_tokens, num_heads, head_dim]
                            const KvLayer &cache, const BatchIndex &batch, int num_heads,
                            cudaStream_t stream);
