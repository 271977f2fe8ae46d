// tensor_copy.cuh -- the bulk tensor copy engine: maps built on the host, copies and clusters on the
// device.
//
// A map describes an array in global memory and the box that one copy brings into shared memory; what a box
// has beyond the array arrives as zeros, and counts as bytes.

#pragma once
#include <cuda.h>

#include "cuda_status.h"
#include "tile.cuh"
extern "C" {
#include "bf16.h"
}

// The driver's encoder, asked for at run time: the library links no driver.
inline Status encode_tensor_map(CUtensorMap *map, CUtensorMapDataType type, int rank, const void *data,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                CUtensorMapSwizzle swizzle) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    constexpr unsigned kDriver = 12000;  // the version that brought the call
    static Encode encode = nullptr;      // the same for every caller: a race stores it twice
    if (!encode) {
        void *entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        TRY(CUDA_STATUS(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kDriver,
                                                         cudaEnableDefault, &found)));
        if (found != cudaDriverEntryPointSuccess)
            return fail(STATUS_UNAVAILABLE, "the driver has no cuTensorMapEncodeTiled");
        encode = reinterpret_cast<Encode>(entry);
    }
    const cuuint32_t kDense[3] = {1, 1, 1};
    CUresult result = encode(map, type, (cuuint32_t)rank, const_cast<void *>(data), sizes, strides, box,
                             kDense, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return STATUS_OK;
    return fail(STATUS_INVALID_ARGUMENT, "cuTensorMapEncodeTiled: error %d", (int)result);
}

// Rows of a row-major bf16 matrix, box_rows by 64 columns at a time, swizzled as tile.cuh says.
inline Status encode_rows_map(CUtensorMap *map, const bf16 *x, int num_rows, int cols, int box_rows) {
    const cuuint64_t sizes[2] = {(cuuint64_t)cols, (cuuint64_t)num_rows};
    const cuuint64_t strides[1] = {(cuuint64_t)cols * sizeof(bf16)};
    const cuuint32_t box[2] = {kTileCols, (cuuint32_t)box_rows};
    return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, x, sizes, strides, box,
                             CU_TENSOR_MAP_SWIZZLE_128B);
}

// A packed weight as [strip of eight rows, k tile, 256 words]: box_strips strips of box_tiles k tiles at a
// time, already swizzled.
inline Status encode_strips_map(CUtensorMap *map, const bf16 *packed, int rows, int cols, int box_strips,
                                int box_tiles = 1) {
    constexpr cuuint64_t kStripBytes = kStripValues * sizeof(bf16);
    const cuuint64_t sizes[3] = {kStripBytes / sizeof(uint32_t), (cuuint64_t)num_tiles(cols),
                                 (cuuint64_t)(padded_rows(rows) / kStripRows)};
    const cuuint64_t strides[2] = {kStripBytes, kStripBytes * num_tiles(cols)};
    const cuuint32_t box[3] = {(cuuint32_t)sizes[0], (cuuint32_t)box_tiles, (cuuint32_t)box_strips};
    return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, packed, sizes, strides, box,
                             CU_TENSOR_MAP_SWIZZLE_NONE);
}

// cp.async.bulk.tensor (PTX ISA 9.7.9.27): one box to shared memory, its bytes counted on the barrier.
__device__ __forceinline__ void copy_box_2d(uint32_t to_shared, const CUtensorMap *map, int first,
                                            int second, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3}], [%4];" ::"r"(to_shared),
        "l"(map), "r"(first), "r"(second), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void copy_box_3d(uint32_t to_shared, const CUtensorMap *map, int first,
                                            int second, int third, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3, %4}], [%5];" ::"r"(to_shared),
        "l"(map), "r"(first), "r"(second), "r"(third), "r"(barrier)
        : "memory");
}

// The same with a cache policy.
__device__ __forceinline__ void copy_box_3d_with_policy(uint32_t to_shared, const CUtensorMap *map,
                                                        int first, int second, int third, uint32_t barrier,
                                                        uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to_shared),
        "l"(map), "r"(first), "r"(second), "r"(third), "r"(barrier), "l"(policy)
        : "memory");
}

// prefetch.tensormap (PTX ISA 9.7.9.17): brings the map itself closer before the first copy.
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
