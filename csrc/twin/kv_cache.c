// kv_cache.c -- new tokens' K and V into their slots of the paged cache, and back.
//
// Shapes    k, v [num_tokens, num_kv_heads, head_dim] bf16; slot_mapping [num_tokens]
// Rounding  none: copies
// Source    Kwon et al., PagedAttention, arXiv:2309.06180
// See       kernels/kv_cache.cu, tests/twin/test_kv_cache.py

#include "kv_cache.h"

Status twin_write_kv_cache(const KvLayer *cache, const bf16 *k, const bf16 *v, const int32_t *slot_mapping,
                           int num_tokens, Stream stream) {
    (void)stream;
    size_t bytes = (size_t)cache->head_dim * sizeof(bf16);
    for (int token = 0; token < num_tokens; token++) {
        for (int head = 0; head < cache->num_kv_heads; head++) {
            size_t from = ((size_t)token * cache->num_kv_heads + head) * cache->head_dim;
            memcpy(k_vector(cache, slot_mapping[token], head), k + from, bytes);
            memcpy(v_vector(cache, slot_mapping[token], head), v + from, bytes);
        }
    }
    return STATUS_OK;
}

Status twin_read_kv_cache(bf16 *k, bf16 *v, const KvLayer *cache, const int32_t *slots, int num_slots,
                          Stream stream) {
    (void)stream;
    size_t bytes = (size_t)cache->head_dim * sizeof(bf16);
    for (int i = 0; i < num_slots; i++) {
        for (int head = 0; head < cache->num_kv_heads; head++) {
            size_t to = ((size_t)i * cache->num_kv_heads + head) * cache->head_dim;
            memcpy(k + to, k_vector(cache, slots[i], head), bytes);
            memcpy(v + to, v_vector(cache, slots[i], head), bytes);
        }
    }
    return STATUS_OK;
}

Status twin_fill_block(const KvLayer *cache, int block_id, bf16 value, Stream stream) {
    (void)stream;
    size_t values = (size_t)2 * cache->block_size * cache->num_kv_heads * cache->head_dim;
    bf16 *block = cache->data + (size_t)block_id * values;
    for (size_t i = 0; i < values; i++) block[i] = value;
    return STATUS_OK;
}
