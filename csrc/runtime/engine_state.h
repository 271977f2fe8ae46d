// engine_state.h -- what an engine holds: everything engine.h promises, allocated once, freed once.

#pragma once
#include "batch.h"
#include "weights.h"

struct Engine {
    Model model;
    EngineOptions options;
    BatchLimits limits;
    WeightSlot *slots;
    int num_slots;
    int is_ready;         // every weight is loaded
    int is_dead;          // the device failed
    int is_stepping;      // a step was begun and not ended
    int32_t *index_host;  // staging for one step's index arrays, and their copy on the device
    int32_t *index_device;
    size_t index_count;    // int32 values in each
    BatchIndex wanted;     // the last step's, for BatchIndex's pointer
    uint32_t *slot_owner;  // batch_check's scratch
    uint32_t step;
    uint8_t *edited_by;          // sampling_check's scratch, [vocab_size]
    int32_t *greedy_arrays;      // [4, max_num_seqs]: input_ids, positions, slots, lengths of a later step
    DecodeLayer *decode_layers;  // [num_layers], what the fused step is given
    void *decode_workspace;      // and its own memory; both null where there is no such step
    DecodeGraphs *decode_graphs;
    bf16 *kv_pool;          // [num_layers, num_blocks, num_kv_heads, 2, block_size, head_dim]
    void *allocations[64];  // of the backend, beside the weights
    int num_allocations;
    int64_t weight_bytes, kv_bytes, workspace_bytes;
};

// config and options within what the kernels serve, refused by field, limit and value (limits.c).
Status check_config(const EngineModelConfig *config);
Status check_options(const EngineOptions *options);

// The most wanted rows that are told as a batch of their own. The kernel that attends for them is meant for
// few: beyond these the last layer's rows are all computed.
enum { MAX_WANTED = 16 };
enum { GREEDY_STEPS = 64 };  // steps of engine_decode between two looks at the host

// Backend memory that lives as long as the engine, counted on `account` (engine.c).
Status allocate(Engine *engine, void *pointer_to_pointer, size_t bytes, int64_t *account);
// The step's index arrays in the backend's memory, and how many values they are at most (index.c).
size_t index_values(const EngineOptions *options);
Status index_of_batch(Engine *engine, const EngineBatch *batch, BatchIndex *index);
// A living engine; a loaded, living engine; or why not (engine.c).
Status check_alive(const Engine *engine);
Status check_usable(const Engine *engine);
// Passes on what the backend said; a device error ends the engine (engine.c).
Status outcome(Engine *engine, Status status);
// Sets up the backend's fused step, where it has one for this model (greedy.c).
Status prepare_decode(Engine *engine);
