// tell_wanted.c -- no fault: opens to a test what index.c tells of the wanted rows; the twin does not read all of it.

#include <string.h>
#include "../../../csrc/runtime/engine_state.h"

// Positions and lengths of the wanted rows, [num_logits], their block tables and the longest length; returns how many
// rows are told.
__attribute__((visibility("default"))) int tell_wanted(const EngineBatch *batch, int32_t *positions,
                                                       int32_t *seq_lens, int32_t *block_tables,
                                                       int32_t *max_seq_len) {
    static int32_t host[1 << 12], device[1 << 12];
    Engine engine = {.index_host = host, .index_device = device};
    engine.model.kernels = twin_kernels();
    BatchIndex index;
    if (index_of_batch(&engine, batch, &index) || !index.wanted) return 0;
    const BatchIndex *wanted = index.wanted;
    size_t rows = (size_t)wanted->num_tokens;
    memcpy(positions, wanted->positions, rows * sizeof(int32_t));
    memcpy(seq_lens, wanted->seq_lens, rows * sizeof(int32_t));
    memcpy(block_tables, wanted->block_tables, rows * (size_t)wanted->max_blocks_per_seq * sizeof(int32_t));
    *max_seq_len = wanted->max_seq_len;
    return wanted->num_tokens;
}
