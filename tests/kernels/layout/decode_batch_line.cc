// decode_batch_line.cc -- how the attention of a decode batch is dealt out, for a test without a GPU.

#define __host__
#define __device__
#include "../../../csrc/kernels/decode_batch_line.cuh"

extern "C" int first_position(int line, int block, int blocks) {
    return run_start(line, block, blocks);
}
extern "C" int block_with(int line, int position, int blocks) {
    return block_of(line, position, blocks);
}
extern "C" int cut_at(int tile, int length) {
    return next_cut(tile, length);
}
