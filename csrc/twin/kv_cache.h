// kv_cache.h -- where a slot's K and V live in the twin's cache (kernels.h, KvLayer).

#pragma once
#include "../kernels/kernels.h"

static inline bf16 *k_vector(const KvLayer *cache, int slot, int head) {
    size_t tile = ((size_t)(slot / cache->block_size) * cache->num_kv_heads + head) * 2 * cache->block_size;
    return cache->data + (tile + slot % cache->block_size) * cache->head_dim;
}

static inline bf16 *v_vector(const KvLayer *cache, int slot, int head) {
    return k_vector(cache, slot, head) + (size_t)cache->block_size * cache->head_dim;
}
