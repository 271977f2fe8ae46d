// kv_vectors.c -- where the twin's cache header puts a slot's vectors, in values from the pool's start, for
// pools that no test could allocate.

#include "../../../csrc/twin/kv_cache.h"

int64_t value_offset(int32_t slot, int32_t head, int32_t block_size, int32_t num_kv_heads, int is_value) {
    KvLayer cache = {(bf16 *)0, 1 << 20, block_size, num_kv_heads, 64};
    bf16 *vector = is_value ? v_vector(&cache, slot, head) : k_vector(&cache, slot, head);
    return (int64_t)((uintptr_t)vector / sizeof(bf16));
}
