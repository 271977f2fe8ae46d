// cuda_kernels.c -- the table through which the model calls the CUDA operations.

#include "kernels.h"

static const Kernels table = {
    .name = "cuda",
    .open_stream = cuda_open_stream,
    .close_stream = cuda_close_stream,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .copy_in = cuda_copy_in,
    .copy_out = cuda_copy_out,
    .synchronize = cuda_synchronize,
    .free_memory = cuda_free_memory,
    .packed_bytes = cuda_packed_bytes,
    .pack_weight = cuda_pack_weight,
    .unpack_weight = cuda_unpack_weight,
    .embedding = cuda_embedding,
    .gather_rows = cuda_gather_rows,
    .rms_norm = cuda_rms_norm,
    .linear = cuda_linear,
    .linear_f32 = cuda_linear_f32,
    .rotary_embedding = cuda_rotary_embedding,
    .write_kv_cache = cuda_write_kv_cache,
    .read_kv_cache = cuda_read_kv_cache,
    .fill_block = cuda_fill_block,
    .attention = cuda_attention,
    .silu_and_mul = cuda_silu_and_mul,
    .residual_add = cuda_residual_add,
    .argmax = cuda_argmax,
    .edit_logits = cuda_edit_logits,
    .restore_logits = cuda_restore_logits,
    .sample = cuda_sample,
    .score_tokens = cuda_score_tokens,
    .tensor_core_step = cuda_tensor_core_step,
    .exp2 = cuda_exp2,
    .linear_add = cuda_linear_add,
    .gated_linear = cuda_gated_linear,
    .qkv_linear = cuda_qkv_linear,
    .fused_min_tokens = cuda_fused_min_tokens,
    .decode_workspace_bytes = cuda_decode_workspace_bytes,
    .open_decode_graphs = cuda_open_decode_graphs,
    .close_decode_graphs = cuda_close_decode_graphs,
    .decode_max_seqs = cuda_decode_max_seqs,
    .decode_step = cuda_decode_step,
};

Status cuda_kernels(const Kernels **kernels) {
    *kernels = &table;
    return STATUS_OK;
}
