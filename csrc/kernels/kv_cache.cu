// kv_cache.cu -- write new keys and values into the paged cache, read slots back, fill a block.
//
//   slot s = block * block_size + offset;  K of (s, head) is row `offset` of tile K of (block, head), V
//   likewise
//
// Shapes    cache [num_blocks, num_kv_heads, K | V, block_size, 64] bf16, each tile swizzled
// (common/tile.cuh);
//           k, v [num_tokens, num_kv_heads, 64]; slot_mapping [num_tokens]
// Rounding  none: copies
// Mapping   one thread per chunk of 16 bytes, of K and of V
// Cost      8 bytes per value of K: memory-bound
// Source    Kwon et al., PagedAttention, arXiv:2309.06180, section 4
// See       twin/kv_cache.c, kernels/attention.cu, tests/kernels/test_bits_attention.py

#include "../common/cuda_status.h"
#include "../common/kv_tile.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;  // full occupancy at any register count

// kWrite: rows -> cache; otherwise cache -> rows.
template <bool kWrite>
static __global__ void copy_kv_kernel(KvLayer cache, bf16 *k, bf16 *v, const int32_t *slots,
                                      int num_slots) {
    int64_t index = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    int chunk = (int)(index % kChunksPerRow);
    int64_t vector = index / kChunksPerRow;  // slot index * num_kv_heads + head
    int64_t i = vector / cache.num_kv_heads;
    if (i >= num_slots) return;
    int head = (int)(vector % cache.num_kv_heads);
    int block = slots[i] / cache.block_size, offset = slots[i] % cache.block_size;
    bf16 *k_chunk = cache.data + kv_tile_offset(block, head, cache.num_kv_heads, cache.block_size) +
                    tile_offset(offset, chunk);
    bf16 *v_chunk = k_chunk + (size_t)cache.block_size * kTileCols;
    size_t row = (size_t)vector * kTileCols + chunk * kChunkValues;
    if constexpr (kWrite) {
        store_vector(k_chunk, load_vector(k + row));
        store_vector(v_chunk, load_vector(v + row));
    } else {
        store_vector(k + row, load_vector(k_chunk));
        store_vector(v + row, load_vector(v_chunk));
    }
}

static __global__ void fill_kernel(bf16 *values, bf16 value, int64_t num_values) {
    int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (i < num_values) values[i] = value;
}

static Status check_head_dim(const KvLayer *cache) {
    if (cache->head_dim == kTileCols) return STATUS_OK;
    return fail(STATUS_INVALID_ARGUMENT, "head_dim must be %d, got %d", kTileCols, cache->head_dim);
}

static unsigned copy_blocks(const KvLayer *cache, int num_slots) {
    int64_t num_chunks = (int64_t)num_slots * cache->num_kv_heads * kChunksPerRow;
    return (unsigned)((num_chunks + kThreads - 1) / kThreads);
}

extern "C" Status cuda_write_kv_cache(const KvLayer *cache, const bf16 *k, const bf16 *v,
                                      const int32_t *slot_mapping, int num_tokens, Stream stream) {
    TRY(check_head_dim(cache));
    if (num_tokens == 0) return STATUS_OK;
    // The kernel of this direction only reads k and v.
    copy_kv_kernel<true><<<copy_blocks(cache, num_tokens), kThreads, 0, (cudaStream_t)stream>>>(
        *cache, const_cast<bf16 *>(k), const_cast<bf16 *>(v), slot_mapping, num_tokens);
    return CUDA_STATUS(cudaGetLastError());
}

// k and v share one staging buffer, k's half first; `slots` stands before them.
static Status read_through(bf16 *k, bf16 *v, const KvLayer *cache, const int32_t *slots, int num_slots,
                           void *staging, size_t slot_bytes, size_t k_bytes, Stream stream) {
    int32_t *device_slots = (int32_t *)staging;
    bf16 *device_k = (bf16 *)((char *)staging + slot_bytes);
    bf16 *device_v = (bf16 *)((char *)staging + slot_bytes + k_bytes);
    TRY(cuda_copy_in(device_slots, slots, (size_t)num_slots * sizeof(int32_t), stream));
    copy_kv_kernel<false><<<copy_blocks(cache, num_slots), kThreads, 0, (cudaStream_t)stream>>>(
        *cache, device_k, device_v, device_slots, num_slots);
    TRY(CUDA_STATUS(cudaGetLastError()));
    TRY(cuda_copy_out(k, device_k, k_bytes, stream));
    return cuda_copy_out(v, device_v, k_bytes, stream);
}

extern "C" Status cuda_read_kv_cache(bf16 *k, bf16 *v, const KvLayer *cache, const int32_t *slots,
                                     int num_slots, Stream stream) {
    TRY(check_head_dim(cache));
    if (num_slots == 0) return STATUS_OK;
    constexpr size_t kAlignment = 256;  // a multiple of the 16 bytes of an access
    size_t slot_bytes = ((size_t)num_slots * sizeof(int32_t) + kAlignment - 1) / kAlignment * kAlignment;
    size_t k_bytes = (size_t)num_slots * cache->num_kv_heads * kTileCols * sizeof(bf16);
    void *staging = nullptr;
    TRY(cuda_alloc(&staging, slot_bytes + 2 * k_bytes, stream));
    Status status = read_through(k, v, cache, slots, num_slots, staging, slot_bytes, k_bytes, stream);
    cuda_free(staging, stream);
    return status;
}

extern "C" Status cuda_fill_block(const KvLayer *cache, int block_id, bf16 value, Stream stream) {
    int64_t num_values = (int64_t)cache->num_kv_heads * 2 * cache->block_size * cache->head_dim;
    fill_kernel<<<(unsigned)((num_values + kThreads - 1) / kThreads), kThreads, 0, (cudaStream_t)stream>>>(
        cache->data + (size_t)block_id * num_values, value, num_values);
    return CUDA_STATUS(cudaGetLastError());
}
