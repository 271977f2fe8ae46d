// pack_weight.cu -- bring a weight matrix into the layout that the linear kernels stream, and back.
//
//   packed tile (i, j), row r, chunk c  =  weight[64 i + r, 64 j + 8 c .. + 7],  0 beyond the matrix
//
// Shapes    weight [rows, cols] bf16 on the host, row-major; packed [ceil(rows / 64), ceil(cols / 64)]
// tiles
//           of 8 KiB (common/tile.cuh)
// Rounding  none: a copy
// Mapping   bands of whole row tiles pass through a staging buffer; one thread per chunk of 16 bytes
// Cost      twice the matrix in device traffic, once over the bus: bound by the bus
// See       twin/packed_matrix.c, tests/kernels/test_bits_copies.py

#include "../common/cuda_status.h"
#include "../common/numerics.h"
#include "../common/tile.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 256;                // full occupancy at any register count
constexpr size_t kStagingBytes = 32u << 20;  // a band this long hides a copy's fixed cost

extern "C" size_t cuda_packed_bytes(int rows, int cols) {
    return (size_t)padded_rows(rows) * num_tiles(cols) * kTileCols * sizeof(bf16);
}

// `first_row` is the band's first row, a multiple of 64; `band` holds band_rows rows of `cols` values.
static __global__ void pack_weight_kernel(bf16 *packed, const bf16 *band, int first_row, int band_rows,
                                          int cols) {
    int chunks = num_tiles(cols) * kChunksPerRow;  // of a padded row
    int64_t index = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    int row = (int)(index / chunks), chunk = (int)(index % chunks);
    if (row >= padded_rows(band_rows)) return;
    bool exists =
        row < band_rows && chunk * kChunkValues < cols;  // cols is a multiple of 16: chunks are whole
    uint4 values =
        exists ? load_vector(band + (size_t)row * cols + chunk * kChunkValues) : make_uint4(0, 0, 0, 0);
    store_vector(packed + packed_offset(first_row + row, chunk, cols), values);
}

static __global__ void unpack_weight_kernel(bf16 *band, const bf16 *packed, int first_row, int band_rows,
                                            int cols) {
    int chunks = cols / kChunkValues;
    int64_t index = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    int row = (int)(index / chunks), chunk = (int)(index % chunks);
    if (row >= band_rows) return;
    store_vector(band + (size_t)row * cols + chunk * kChunkValues,
                 load_vector(packed + packed_offset(first_row + row, chunk, cols)));
}

static int rows_per_band(int rows, int cols) {
    size_t row_tiles = kStagingBytes / ((size_t)kPaddedRows * cols * sizeof(bf16));
    size_t band = (row_tiles > 0 ? row_tiles : 1) * kPaddedRows;
    return band < (size_t)rows ? (int)band : rows;
}

// A chunk must not straddle the end of a row, here or in the linear kernels' steps.
static Status check_cols(const Matrix *packed) {
    if (packed->cols % NUMERICS_STEP == 0) return STATUS_OK;
    return fail(STATUS_INVALID_ARGUMENT, "cols must be a multiple of %d, got %d", (int)NUMERICS_STEP,
                packed->cols);
}

static unsigned blocks_for(int64_t num_threads) {
    return (unsigned)((num_threads + kThreads - 1) / kThreads);
}

static Status pack_bands(Matrix *packed, const bf16 *weight, bf16 *band, cudaStream_t stream) {
    int rows = packed->rows, cols = packed->cols, step = rows_per_band(rows, cols);
    for (int first = 0; first < rows; first += step) {
        int band_rows = rows - first < step ? rows - first : step;
        size_t bytes = (size_t)band_rows * cols * sizeof(bf16);
        TRY(CUDA_STATUS(
            cudaMemcpyAsync(band, weight + (size_t)first * cols, bytes, cudaMemcpyHostToDevice, stream)));
        int64_t num_chunks = (int64_t)padded_rows(band_rows) * num_tiles(cols) * kChunksPerRow;
        pack_weight_kernel<<<blocks_for(num_chunks), kThreads, 0, stream>>>((bf16 *)packed->data, band,
                                                                            first, band_rows, cols);
        TRY(CUDA_STATUS(cudaGetLastError()));
    }
    return CUDA_STATUS(cudaStreamSynchronize(stream));  // the staging buffer goes next
}

static Status unpack_bands(bf16 *weight, const Matrix *packed, bf16 *band, cudaStream_t stream) {
    int rows = packed->rows, cols = packed->cols, step = rows_per_band(rows, cols);
    for (int first = 0; first < rows; first += step) {
        int band_rows = rows - first < step ? rows - first : step;
        size_t bytes = (size_t)band_rows * cols * sizeof(bf16);
        unpack_weight_kernel<<<blocks_for((int64_t)band_rows * cols / kChunkValues), kThreads, 0, stream>>>(
            band, (const bf16 *)packed->data, first, band_rows, cols);
        TRY(CUDA_STATUS(cudaGetLastError()));
        TRY(CUDA_STATUS(
            cudaMemcpyAsync(weight + (size_t)first * cols, band, bytes, cudaMemcpyDeviceToHost, stream)));
    }
    return CUDA_STATUS(
        cudaStreamSynchronize(stream));  // the host's copy is there, the staging buffer may go
}

extern "C" Status cuda_pack_weight(Matrix *packed, const bf16 *weight, Stream stream) {
    void *band = nullptr;
    TRY(check_cols(packed));
    if (packed->rows == 0 || packed->cols == 0) return STATUS_OK;
    TRY(cuda_alloc(&band, (size_t)rows_per_band(packed->rows, packed->cols) * packed->cols * sizeof(bf16),
                   stream));
    Status status = pack_bands(packed, weight, (bf16 *)band, (cudaStream_t)stream);
    cuda_free(band, stream);
    return status;
}

extern "C" Status cuda_unpack_weight(bf16 *weight, const Matrix *packed, Stream stream) {
    void *band = nullptr;
    TRY(check_cols(packed));
    if (packed->rows == 0 || packed->cols == 0) return STATUS_OK;
    TRY(cuda_alloc(&band, (size_t)rows_per_band(packed->rows, packed->cols) * packed->cols * sizeof(bf16),
                   stream));
    Status status = unpack_bands(weight, packed, (bf16 *)band, (cudaStream_t)stream);
    cuda_free(band, stream);
    return status;
}
