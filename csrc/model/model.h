// model.h -- the model on one page: its weights, its activations and its cache, each with its shape.

#pragma once
#include "../kernels/kernels.h"

// One decoder layer; names as in the checkpoint, after model.layers.{i}.
typedef struct LayerWeights {
    bf16 *input_layernorm;           // [hidden_size]
    Matrix q_proj;                   // [num_heads * head_dim, hidden_size]
    Matrix k_proj;                   // [num_kv_heads * head_dim, hidden_size]
    Matrix v_proj;                   // [num_kv_heads * head_dim, hidden_size]
    Matrix o_proj;                   // [hidden_size, num_heads * head_dim]
    bf16 *post_attention_layernorm;  // [hidden_size]
    Matrix gate_proj;                // [intermediate_size, hidden_size]
    Matrix up_proj;                  // [intermediate_size, hidden_size]
    Matrix down_proj;                // [hidden_size, intermediate_size]
} LayerWeights;

typedef struct Weights {
    Matrix embed_tokens;   // [vocab_size, hidden_size]
    LayerWeights *layers;  // [num_layers]
    bf16 *norm;            // [hidden_size]
    Matrix lm_head;        // [vocab_size, hidden_size]; the embedding's memory when tied
    bf16 *rope_table;      // [max_seq_len, head_dim]: cos | sin
} Weights;

// What a step writes; sized once for the largest step. What is never alive together shares memory: q, k, v,
// attn and projected with up; gate with act, which is computed in its place; the logits with all of these.
typedef struct Activations {
    bf16 *residual;     // [max_num_tokens, hidden_size]
    bf16 *normed;       // [max_num_tokens, hidden_size]
    bf16 *q;            // [max_num_tokens, num_heads, head_dim]
    bf16 *k;            // [max_num_tokens, num_kv_heads, head_dim]
    bf16 *v;            // [max_num_tokens, num_kv_heads, head_dim]
    bf16 *attn;         // [max_num_tokens, num_heads, head_dim]
    bf16 *projected;    // [max_num_tokens, hidden_size]: o's and down's output
    bf16 *gate;         // [max_num_tokens, intermediate_size]
    bf16 *up;           // [max_num_tokens, intermediate_size]
    bf16 *act;          // [max_num_tokens, intermediate_size]
    float *logits;      // [logits_rows, vocab_size]
    int32_t *next_ids;  // [logits_rows]
    int logits_rows;    // rows of logits computed at a time
} Activations;

// Where sampling works: sized once for a slice of logits_rows rows and the edits of one row at least.
typedef struct SamplingRoom {
    void *host_staged;        // a slice's rows, then its edits
    void *staged;             // the same in the backend's memory
    float *saved;             // [max_edits]
    TokenScore *scores;       // [max_rows]
    TokenScore *host_scores;  // [max_rows]
    int max_edits;
} SamplingRoom;

typedef struct SamplingSizes {
    int max_edits;
    size_t staged, saved, scores;  // bytes of the room's arrays
} SamplingSizes;

SamplingSizes sampling_sizes(int max_rows, int vocab_size);

// Tokens chosen on the backend; their ids, and scores where asked for, are not on the host yet.
typedef struct Chosen {
    int first, num_rows;  // which of the step's rows of logits; no rows: nothing is owed
    int is_scored;
    const EngineSampling *sampling;  // null: all by arg-max
    int32_t *next_ids;               // host [num_rows], or null
} Chosen;

typedef struct Model {
    EngineModelConfig config;
    const Kernels *kernels;
    Stream stream;
    Weights weights;
    Activations activations;
    SamplingRoom sampling;
    Chosen chosen;         // what model_collect will bring
    KvLayer *cache;        // [num_layers]
    DecodeProblem decode;  // for the backend's fused step; workspace is null where it has none
} Model;

// Where the forward pass shows its values (runtime/tap.c); null members do nothing.
typedef struct TapSet {
    const EngineTap *taps;
    int num_taps;
} TapSet;

// Rows first_row .. first_row + num_rows - 1 of a tap's [.., width] value.
Status tap_rows(const Model *model, const TapSet *set, TapPoint point, int layer, void *value,
                int first_row, int num_rows);
int tap_width(const EngineModelConfig *config, TapPoint point);
int tap_value_size(TapPoint point);  // bytes

// The table of cos and sin, bf16 [max_positions, head_dim], on the host.
Status rope_table_fill(bf16 *table, const EngineModelConfig *config, int max_positions);

// The draw of a seed, a position and a choice, in units of 2^-64.
uint64_t uniform_of(uint64_t seed, int32_t position, int32_t choice);

// What choosing tokens needs beside the logits.
typedef struct SamplingTask {
    const Kernels *kernels;
    Stream stream;
    const SamplingRoom *room;
    const EngineSampling *sampling;
    const uint64_t *uniforms;  // host [all rows], or null: the rows' own
    int32_t *ids;              // backend [num_rows]
    int vocab_size;
    Chosen *chosen;  // the slice whose results still lie in the room
} SamplingTask;

// The kernels' arrays for rows first .. first + num_rows - 1, in the backend's memory.
Status stage_sampling(const SamplingTask *task, int first, int num_rows, const SampleRow **rows,
                      const LogitEdit **device_edits, int *num_edits);

// Rows first .. first + num_rows - 1 of a step, whose logits are given: tokens to the host array next_ids
// [num_rows], unless null, and scores to the sampling's arrays. The logits are left as they were. Rows go
// in slices; a slice's results are collected before the next takes their room, the last's by
// collect_tokens.
Status choose_tokens(const SamplingTask *task, float *logits, int first, int num_rows, int32_t *next_ids);
Status collect_tokens(const SamplingTask *task);

// The fused step: whether it can take this batch, and one or several greedy steps with it. `next_ids` is
// [num_steps, num_seqs] on the host, or null. The batch's arrays advance in place; `steps_before` are
// already done. `sampling` chooses the last step's tokens, where not null. Ended by model_collect.
int decode_applies(const Model *model, const BatchIndex *batch);
Status decode_forward(Model *model, const BatchIndex *batch, int steps_before, int num_steps,
                      const EngineSampling *sampling, float *logits, int32_t *next_ids);

// A layer's fused parts for many tokens, and whether they serve: q, k and v from the norm, o and the whole
// MLP into the residual stream.
int prefill_applies(const Model *model, const BatchIndex *batch, const TapSet *taps);
Status prefill_query_key_value(Model *model, int layer, const BatchIndex *batch);
Status prefill_output(Model *model, int layer, const BatchIndex *batch);
Status prefill_mlp(Model *model, int layer, const BatchIndex *batch);

// One step: fills host arrays logits [num_logits, vocab_size] and next_ids [num_logits], either may be
// null; next_ids are the arg-max, or chosen as `sampling` says, unless null. Returns once everything is on
// the stream; model_collect waits for it and fills what is still owed.
Status model_forward(Model *model, const BatchIndex *batch, const TapSet *taps,
                     const EngineSampling *sampling, float *logits, int32_t *next_ids);
Status model_collect(Model *model);
// Its last part: the logits of rows first .. first + num_rows - 1 of the step are in the activations.
Status model_choose(Model *model, const EngineSampling *sampling, int first, int num_rows,
                    int32_t *next_ids);
