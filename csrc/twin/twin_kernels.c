// twin_kernels.c -- the CPU's table, its memory, and the bare tensor-core step.

#include <stdlib.h>
#include <unistd.h>
#include "../kernels/kernels.h"
#include "tensor_core.h"

Status twin_alloc(void **memory, size_t bytes, Stream stream) {
    (void)stream;
    // Not a byte more than asked for: make sanitize-cpu sees what lies beyond.
    if (posix_memalign(memory, 64, bytes ? bytes : 1) == 0) return STATUS_OK;
    *memory = NULL;
    return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", bytes);
}

void twin_free(void *memory, Stream stream) {
    (void)stream;
    free(memory);
}

Status twin_copy_in(void *to, const void *from_host, size_t bytes, Stream stream) {
    (void)stream;
    if (bytes) memcpy(to, from_host, bytes);
    return STATUS_OK;
}

Status twin_copy_out(void *to_host, const void *from, size_t bytes, Stream stream) {
    (void)stream;
    if (bytes) memcpy(to_host, from, bytes);
    return STATUS_OK;
}

Status twin_synchronize(Stream stream) {
    (void)stream;
    return STATUS_OK;
}

Status twin_free_memory(int64_t *bytes, Stream stream) {
    (void)stream;
    *bytes = (int64_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);  // pages the system has not used
    return STATUS_OK;
}

Status twin_tensor_core_step(float *d, const float *c, const bf16 *a, const bf16 *b, int64_t n,
                             Stream stream) {
    (void)stream;
    for (int64_t i = 0; i < n; i++)
        d[i] = tensor_core_step(c[i], a + i * NUMERICS_STEP, b + i * NUMERICS_STEP);
    return STATUS_OK;
}

const Kernels *twin_kernels(void) {
    static const Kernels table = {
        .name = "twin",
        .open_stream = twin_open_stream,
        .close_stream = twin_close_stream,
        .alloc = twin_alloc,
        .free = twin_free,
        .copy_in = twin_copy_in,
        .copy_out = twin_copy_out,
        .synchronize = twin_synchronize,
        .free_memory = twin_free_memory,
        .packed_bytes = twin_packed_bytes,
        .pack_weight = twin_pack_weight,
        .unpack_weight = twin_unpack_weight,
        .embedding = twin_embedding,
        .gather_rows = twin_gather_rows,
        .rms_norm = twin_rms_norm,
        .linear = twin_linear,
        .linear_f32 = twin_linear_f32,
        .rotary_embedding = twin_rotary_embedding,
        .write_kv_cache = twin_write_kv_cache,
        .read_kv_cache = twin_read_kv_cache,
        .fill_block = twin_fill_block,
        .attention = twin_attention,
        .silu_and_mul = twin_silu_and_mul,
        .residual_add = twin_residual_add,
        .argmax = twin_argmax,
        .edit_logits = twin_edit_logits,
        .restore_logits = twin_restore_logits,
        .sample = twin_sample,
        .score_tokens = twin_score_tokens,
        .tensor_core_step = twin_tensor_core_step,
        .exp2 = twin_exp2,
    };
    return &table;
}
