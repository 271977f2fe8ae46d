// engine.h -- the engine as Python sees it: create, load weights, forward, read back, close.
//
// Read by C, by CUDA and by cffi alike, so: no macro, no #ifdef, no inline function; lines that start
// with '#' are dropped by Python. Every function returns a Status and writes its result through its last
// pointers; after a failure engine_last_error() tells, on the calling thread, which field was wrong, the
// limit and the value. The library never exits, aborts or prints. A handle serves one thread at a time.

#pragma once
#include <stddef.h>
#include <stdint.h>
#pragma GCC visibility push(default)

typedef enum Status {
    STATUS_OK = 0,
    STATUS_INVALID_ARGUMENT = 1,  // the caller's data; nothing was changed, the engine stays usable
    STATUS_OUT_OF_MEMORY = 2,     // host or device; what was asked and what was free is in the message
    STATUS_UNAVAILABLE = 3,       // no such device, no driver, or built without CUDA
    STATUS_DEVICE_ERROR = 4,      // the device failed: the engine is dead, the process lives
} Status;

typedef enum Device { DEVICE_CPU = 0, DEVICE_CUDA = 1 } Device;

typedef enum RopeType { ROPE_DEFAULT = 0, ROPE_LLAMA3 = 1 } RopeType;

// What was built, for the check at import that library and Python belong together.
typedef struct EngineBuildInfo {
    int32_t abi_version;         // raised when a signature or a struct changes
    int32_t has_cuda;            // 1 if the CUDA kernels are in the library
    uint32_t model_config_size;  // sizeof of each struct below, as the C compiler saw it
    uint32_t engine_options_size;
    uint32_t engine_batch_size;
    uint32_t engine_tap_size;
    uint32_t engine_sampling_size;
    uint32_t engine_sampling_row_size;
    uint32_t engine_logit_edit_size;
    char source_stamp[65];      // SHA-256 of csrc/ at build time, hexadecimal
    char numerics_version[64];  // docs/numerics.md: changes exactly when a bit may change
} EngineBuildInfo;

// The model's dimensions, named as in config.json.
typedef struct EngineModelConfig {
    int32_t vocab_size;
    int32_t hidden_size;        // multiple of 64
    int32_t intermediate_size;  // multiple of 64
    int32_t num_layers;
    int32_t num_heads;  // multiple of num_kv_heads
    int32_t num_kv_heads;
    int32_t head_dim;             // 64
    int32_t tie_word_embeddings;  // 1: lm_head is the embedding table
    float rms_norm_eps;
    int32_t rope_type;  // RopeType
    double rope_theta;
    double rope_factor;  // the four below: ROPE_LLAMA3 only
    double rope_low_freq_factor;
    double rope_high_freq_factor;
    int32_t rope_original_max_position_embeddings;
} EngineModelConfig;

// How much room the engine gets; fixed for its life.
typedef struct EngineOptions {
    int32_t device;          // Device
    int32_t num_threads;     // CPU threads, 0 = every core
    int32_t block_size;      // tokens per KV block: 16, 32, 64 or 128
    int32_t num_blocks;      // KV blocks in the pool
    int32_t max_seq_len;     // tokens of the longest sequence, prompt and answer
    int32_t max_num_tokens;  // tokens of one step
    int32_t max_num_seqs;    // sequences of one step
    int32_t enforce_eager;   // 1: decode steps are launched anew each time, not replayed as graphs
} EngineOptions;

// How the token of one row of logits is chosen, and whether it is scored. docs/numerics.md section 8 has
// the arithmetic.
typedef struct EngineSamplingRow {
    uint64_t seed;             // of the request; seed, position and choice alone decide the draw
    int32_t position;          // of the token to choose, in its sequence, >= 0
    int32_t choice;            // which of the request's answers this is, >= 0
    float temperature;         // 0: the arg-max; else 1e-5 .. 100
    float top_p;               // 1e-6 .. 1; 1: no limit
    float min_p;               // 0 .. 1; 0: no limit
    int32_t top_k;             // >= 0; 0: no limit
    float repetition_penalty;  // 0.01 .. 100; 1: none
    float presence_penalty;    // -2 .. 2
    float frequency_penalty;   // -2 .. 2
    int32_t num_logprobs;      // -1: not scored; else the most likely tokens listed, 0 .. max_logprobs
    int32_t scored_id;         // the token to score, -1: the one chosen
    int32_t first_edit;        // which of EngineSampling's edits is this row's first, >= 0
    int32_t num_edits;         // how many from there on are this row's
} EngineSamplingRow;

typedef enum EngineEditFlags {
    EDIT_SEEN = 1,    // in the prompt or the answer: repetition_penalty applies
    EDIT_BANNED = 2,  // cannot be chosen
} EngineEditFlags;

// A logit that changes before the choice.
typedef struct EngineLogitEdit {
    int32_t token_id;  // at most once per row
    int32_t count;     // occurrences in the answer: presence_penalty, frequency_penalty
    float bias;        // added, -100 .. 100
    int32_t flags;     // of EngineEditFlags
} EngineLogitEdit;

enum { ENGINE_MAX_LOGPROBS = 20 };

// How a step's tokens are chosen. Scores are natural log-probabilities of the unmodified logits; rows that
// ask for none, and places beyond a row's num_logprobs, are not written.
typedef struct EngineSampling {
    const EngineSamplingRow *rows;  // [num_logits]
    const EngineLogitEdit *edits;   // [num_edits], each row's together; between them anything may lie
    int32_t num_edits;
    int32_t max_logprobs;   // row length of the two arrays of alternatives, 0 .. ENGINE_MAX_LOGPROBS
    float *token_logprobs;  // [num_logits] or null, where no row is scored
    int32_t *token_ranks;   // [num_logits], 1: the arg-max
    int32_t *top_ids;       // [num_logits, max_logprobs], the most likely first, lower id on a tie
    float *top_logprobs;    // [num_logits, max_logprobs]
} EngineSampling;

// One step: sequences one after another, each with its new tokens in position order. A sequence with one
// new token decodes, one with more prefills; both may ride in the same step.
typedef struct EngineBatch {
    int32_t num_tokens;
    int32_t num_seqs;
    int32_t max_blocks_per_seq;      // row length of block_tables
    int32_t num_logits;              // rows of logits wanted, 0 allowed
    const int32_t *input_ids;        // [num_tokens], 0 <= id < vocab_size
    const int32_t *positions;        // [num_tokens], position of each token in its sequence
    const int32_t *slot_mapping;     // [num_tokens], block_id * block_size + position % block_size
    const int32_t *cu_seqlens_q;     // [num_seqs + 1], prefix sum of new tokens, starts at 0
    const int32_t *seq_lens;         // [num_seqs], tokens in the cache after this step
    const int32_t *block_tables;     // [num_seqs, max_blocks_per_seq], block ids in position order
    const int32_t *logits_indices;   // [num_logits], rows of the step whose logits are wanted, ascending
    float *logits;                   // [num_logits, vocab_size] or null
    int32_t *next_ids;               // [num_logits] arg-max of each row, lowest id on a tie, or null
    const EngineSampling *sampling;  // how next_ids are chosen instead, or null
} EngineBatch;

// Named points of the forward pass, in the order in which one layer reaches them.
typedef enum TapPoint {
    TAP_EMBED = 0,
    TAP_ATTN_NORM,
    TAP_Q,
    TAP_K,
    TAP_V,
    TAP_Q_ROPE,
    TAP_K_ROPE,
    TAP_ATTN,
    TAP_O,
    TAP_ATTN_RESIDUAL,
    TAP_MLP_NORM,
    TAP_GATE,
    TAP_UP,
    TAP_ACT,
    TAP_DOWN,
    TAP_MLP_RESIDUAL,
    TAP_FINAL_NORM,
    TAP_LOGITS,
    NUM_TAP_POINTS
} TapPoint;

// Look at, or replace, one value of the forward pass. `out` receives what the operation computed; then
// `force`, where given, takes its place for everything that follows: so each operation can be fed known
// input.
typedef struct EngineTap {
    int32_t point;      // TapPoint
    int32_t layer;      // 0 .. num_layers - 1; 0 for embed, final_norm and logits
    void *out;          // host, [rows, width] bf16 (logits: float32), or null
    const void *force;  // host, same shape and type, or null; not for logits
} EngineTap;

typedef struct Engine Engine;

Status engine_build_info(EngineBuildInfo *info);
Status engine_last_error(const char **message);  // valid until the thread's next call

// The engine allocates everything here: later steps never ask for memory.
Status engine_create(const EngineModelConfig *config, const EngineOptions *options, Engine **engine);

// Copies one tensor in; `data` is bf16 [rows, cols] row-major (a vector has rows 1), names are the
// checkpoint's. `num_not_finite` counts its NaN and Inf values.
Status engine_load_weight(Engine *engine, const char *name, const void *data, int64_t rows, int64_t cols,
                          int64_t *num_not_finite);
// Reads a loaded tensor back, bit for bit.
Status engine_read_weight(Engine *engine, const char *name, void *data, int64_t rows, int64_t cols);
// After the last tensor: fails, naming it, if one is missing.
Status engine_finish_loading(Engine *engine);

Status engine_forward(Engine *engine, const EngineBatch *batch, const EngineTap *taps, int32_t num_taps);

// The same in two calls, so that the caller works while the device does. Once `begin` has returned, the
// batch and its index arrays may change; its sampling and its outputs must live until `end`, which waits
// and fills them. Between the two no other step may begin. Logits are waited for by `begin` where wanted.
Status engine_forward_begin(Engine *engine, const EngineBatch *batch);
Status engine_forward_end(Engine *engine);

// `num_steps` greedy steps in a row without a look at the host: step i + 1 takes the arg-max of step i.
// `batch` is the first step, its sampling null; every sequence has one new token, logits_indices names
// every row, and the block tables reach num_steps - 1 tokens further. logits, where not null, are the last
// step's. next_ids [num_steps, num_seqs].
Status engine_decode(Engine *engine, const EngineBatch *batch, int32_t num_steps, int32_t *next_ids);

// Values per row of a tap and bytes per value (2: bf16, 4: float32). Rows: num_tokens, but num_logits for
// final_norm and logits.
Status engine_tap_shape(Engine *engine, int32_t point, int32_t *width, int32_t *value_size);

// K and V of `num_slots` cache slots of one layer, each [num_slots, num_kv_heads, head_dim] bf16.
Status engine_read_kv(Engine *engine, int32_t layer, const int32_t *slots, int32_t num_slots, void *k,
                      void *v);
// Sets every value of the named blocks, all layers, to one bf16 pattern; tests poison with it.
Status engine_fill_blocks(Engine *engine, const int32_t *block_ids, int32_t num_block_ids, uint16_t value);

// Bytes held: weights, KV pool and everything else.
Status engine_memory(Engine *engine, int64_t *weights, int64_t *kv_cache, int64_t *workspace);
// Bytes that the engine's device has left; on the CPU, memory that the system does not use at all.
Status engine_free_memory(Engine *engine, int64_t *bytes);

Status engine_destroy(Engine *engine);  // null allowed

#pragma GCC visibility pop
