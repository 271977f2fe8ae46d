// kernels.h -- the catalogue: each operation's signature, once, and the table through which the model calls
// it.
//
// Two tables exist: twin/ fills one in plain C, kernels/ fills one in CUDA. Both obey docs/numerics.md, so
// they give the same bits. Destination first, then inputs, sizes, scalars, stream. Pointers are the
// backend's own memory (host for the twin, device for CUDA). Preconditions are checked by the caller
// (runtime/batch.c, runtime/ops.c); operations trust.

#pragma once
#include "../common/bf16.h"
#include "../common/status.h"

// Where work runs and in which order: a CUDA stream, or the twin's pool of threads.
typedef struct StreamImpl *Stream;

// A weight matrix [rows, cols] in the backend's own packed layout (pack_weight); cols multiple of 16.
typedef struct Matrix {
    void *data;
    int rows;
    int cols;
} Matrix;

// One layer of the paged KV cache. A block holds its K tile, then its V tile, per kv head:
// element (slot, head, d) of K is at ((block * num_kv_heads + head) * 2 * block_size + offset) * head_dim +
// d with block = slot / block_size, offset = slot % block_size; V follows K's block_size * head_dim values.
// A backend may permute values inside one tile (the GPU swizzles) as long as copy_kv undoes it.
typedef struct KvLayer {
    bf16 *data;
    int num_blocks;
    int block_size;  // tokens per block
    int num_kv_heads;
    int head_dim;
} KvLayer;

// The index arrays of one step, in the backend's memory; shapes as in EngineBatch.
typedef struct BatchIndex {
    int num_tokens;
    int num_seqs;
    int max_blocks_per_seq;
    int num_logits;
    int max_seq_len_q;  // longest run of new tokens of one sequence
    int max_seq_len;    // longest sequence after this step
    const int32_t *input_ids;
    const int32_t *positions;
    const int32_t *slot_mapping;
    const int32_t *cu_seqlens_q;
    const int32_t *seq_lens;
    const int32_t *block_tables;
    const int32_t *logits_indices;
    // Sequences of more than one new token, so that nothing is launched for the others; null: not told.
    const int32_t *prefill_seqs;  // [num_prefill_seqs]
    int num_prefill_seqs;
    // The rows whose logits are wanted as a batch of their own, a sequence of one new token each; null: not
    // told. Its tokens have no ids and no slots.
    const struct BatchIndex *wanted;
} BatchIndex;

// Devices and memory.
typedef Status OpenStream(Stream *stream, int num_threads);
typedef void CloseStream(Stream stream);
typedef Status Alloc(void **memory, size_t bytes, Stream stream);  // contents undefined
typedef void Free(void *memory, Stream stream);
typedef Status CopyIn(void *to, const void *from_host, size_t bytes, Stream stream);
typedef Status CopyOut(void *to_host, const void *from, size_t bytes, Stream stream);  // done on return
typedef Status Synchronize(Stream stream);
typedef Status FreeMemory(int64_t *bytes, Stream stream);  // that could be allocated now

// Weights: row-major bf16 [rows, cols] on the host <-> the packed layout.
typedef size_t PackedBytes(int rows, int cols);
typedef Status PackWeight(Matrix *packed, const bf16 *weight, Stream stream);
typedef Status UnpackWeight(bf16 *weight, const Matrix *packed, Stream stream);

// out[t] = row ids[t] of table.
typedef Status Embedding(bf16 *out,            // [num_tokens, table->cols]
                         const Matrix *table,  // [vocab_size, hidden_size]
                         const int32_t *ids,   // [num_tokens]
                         int num_tokens, Stream stream);

// out[i] = x[indices[i]], whole rows.
typedef Status GatherRows(bf16 *out,               // [num_rows, width]
                          const bf16 *x,           // [.., width]
                          const int32_t *indices,  // [num_rows]
                          int num_rows, int width, Stream stream);

typedef Status RmsNorm(bf16 *out,           // [num_tokens, hidden_size]
                       const bf16 *x,       // [num_tokens, hidden_size]
                       const bf16 *weight,  // [hidden_size]
                       int num_tokens, int hidden_size, float eps, Stream stream);

// out = x weightᵀ, rounded to bf16.
typedef Status Linear(bf16 *out,             // [num_tokens, weight->rows]
                      const bf16 *x,         // [num_tokens, weight->cols]
                      const Matrix *weight,  // [out_features, in_features]
                      int num_tokens, Stream stream);

// out = x weightᵀ, left in float32: the logits.
typedef Status LinearF32(float *out,            // [num_tokens, weight->rows]
                         const bf16 *x,         // [num_tokens, weight->cols]
                         const Matrix *weight,  // [out_features, in_features]
                         int num_tokens, Stream stream);

typedef Status RotaryEmbedding(bf16 *out,                 // [num_tokens, num_heads, head_dim]
                               const bf16 *x,             // [num_tokens, num_heads, head_dim]
                               const bf16 *table,         // [max_positions, head_dim]: cos | sin
                               const int32_t *positions,  // [num_tokens]
                               int num_tokens, int num_heads, int head_dim, Stream stream);

typedef Status WriteKvCache(const KvLayer *cache,
                            const bf16 *k,                // [num_tokens, num_kv_heads, head_dim]
                            const bf16 *v,                // [num_tokens, num_kv_heads, head_dim]
                            const int32_t *slot_mapping,  // [num_tokens]
                            int num_tokens, Stream stream);

// Slots of one layer, read back to the host.
typedef Status ReadKvCache(bf16 *k,  // host [num_slots, num_kv_heads, head_dim]
                           bf16 *v,  // host [num_slots, num_kv_heads, head_dim]
                           const KvLayer *cache,
                           const int32_t *slots,  // host [num_slots]
                           int num_slots, Stream stream);

// Sets all values of one block of one layer.
typedef Status FillBlock(const KvLayer *cache, int block_id, bf16 value, Stream stream);

// Causal attention of each new token over its sequence's cached keys, its own included.
typedef Status Attention(bf16 *out,      // [num_tokens, num_heads, head_dim]
                         const bf16 *q,  // [num_tokens, num_heads, head_dim]
                         const KvLayer *cache, const BatchIndex *batch, int num_heads, Stream stream);

typedef Status SiluAndMul(bf16 *out,         // [num_values]; may be gate
                          const bf16 *gate,  // [num_values]
                          const bf16 *up,    // [num_values]
                          int64_t num_values, Stream stream);

typedef Status ResidualAdd(bf16 *out,      // [num_values]; may be x or y
                           const bf16 *x,  // [num_values]
                           const bf16 *y,  // [num_values]
                           int64_t num_values, Stream stream);

// Fused operations for many tokens: to the bit what the operations above write one after another.

// out = residual + x weightᵀ, the product rounded to bf16 first.
typedef Status LinearAdd(bf16 *out,             // [num_tokens, weight->rows]; may be residual
                         const bf16 *x,         // [num_tokens, weight->cols]
                         const Matrix *weight,  // [out_features, in_features]
                         const bf16 *residual,  // [num_tokens, weight->rows]
                         int num_tokens, Stream stream);

// out = silu_and_mul of both linear layers.
typedef Status GatedLinear(bf16 *out,           // [num_tokens, gate->rows]
                           const bf16 *x,       // [num_tokens, gate->cols]
                           const Matrix *gate,  // [intermediate_size, hidden_size]
                           const Matrix *up,    // [intermediate_size, hidden_size]
                           int num_tokens, Stream stream);

// q = x q_projᵀ, rotated; x k_projᵀ, rotated, and x v_projᵀ go to the cache's slots.
typedef Status QkvLinear(bf16 *q,  // [num_tokens, num_heads, head_dim]
                         const KvLayer *cache,
                         const bf16 *x,                // [num_tokens, hidden_size]
                         const Matrix *q_proj,         // [num_heads * head_dim, hidden_size]
                         const Matrix *k_proj,         // [num_kv_heads * head_dim, hidden_size]
                         const Matrix *v_proj,         // [num_kv_heads * head_dim, hidden_size]
                         const bf16 *table,            // [max_positions, head_dim]: cos | sin
                         const int32_t *positions,     // [num_tokens]
                         const int32_t *slot_mapping,  // [num_tokens]
                         int num_tokens, Stream stream);
// The fewest tokens for which the three above are worth taking.
typedef int FusedMinTokens(void);

typedef Status Argmax(int32_t *ids,         // [num_rows]
                      const float *logits,  // [num_rows, vocab_size]
                      int num_rows, int vocab_size, Stream stream);

// How one row's token is chosen, in the terms of docs/numerics.md section 8.
typedef struct SampleRow {
    uint64_t uniform;  // the draw, in units of 2^-64
    uint64_t top_p;    // the mass kept, in units of 2^-64; 0: no limit
    float scale;       // float32(log2(e) / temperature); 0: the row keeps its arg-max
    float min_p;
    int32_t top_k;  // 0: no limit
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    int32_t num_logprobs;  // -1: not scored
    int32_t scored_id;     // -1: the chosen one
} SampleRow;

// A logit that changes before the choice; (row, token_id) occurs once.
typedef struct LogitEdit {
    int32_t row;
    int32_t token_id;
    int32_t count;
    float bias;
    int32_t flags;  // EngineEditFlags
} LogitEdit;

// What a row's log-probabilities are made of.
typedef struct TokenScore {
    uint64_t mass;  // sum of all weights; 0 where the largest logit is not finite
    float largest;  // logit
    float logit;    // of the scored token
    int32_t rank;   // of the scored token, 1: the arg-max
    int32_t top_ids[ENGINE_MAX_LOGPROBS];
    float top_logits[ENGINE_MAX_LOGPROBS];
} TokenScore;

// Bias, penalties and bans, in place; the values that were there go to `saved`.
typedef Status EditLogits(float *logits,           // [num_rows, vocab_size]
                          float *saved,            // [num_edits]
                          const LogitEdit *edits,  // [num_edits]
                          const SampleRow *rows,   // [num_rows]
                          int num_edits, int vocab_size, Stream stream);

// Undoes it.
typedef Status RestoreLogits(float *logits,           // [num_rows, vocab_size]
                             const float *saved,      // [num_edits]
                             const LogitEdit *edits,  // [num_edits]
                             int num_edits, int vocab_size, Stream stream);

// Temperature, top-k, top-p, min-p and the draw; rows without a temperature are left as they are.
typedef Status Sample(int32_t *ids,           // [num_rows]: each row's arg-max, then its token
                      const float *logits,    // [num_rows, vocab_size]
                      const SampleRow *rows,  // [num_rows]
                      int num_rows, int vocab_size, Stream stream);

// Rows with num_logprobs < 0 are left out.
typedef Status ScoreTokens(TokenScore *scores,     // [num_rows]
                           const float *logits,    // [num_rows, vocab_size]
                           const int32_t *ids,     // [num_rows]: the chosen tokens
                           const SampleRow *rows,  // [num_rows]
                           int num_rows, int vocab_size, Stream stream);

// A decoder layer as a fused step takes it, its cache included.
typedef struct DecodeLayer {
    const bf16 *input_layernorm;           // [hidden_size]
    const bf16 *post_attention_layernorm;  // [hidden_size]
    Matrix q_proj, k_proj, v_proj, o_proj;
    Matrix gate_proj, up_proj, down_proj;
    KvLayer cache;
} DecodeLayer;

// A backend's recorded launches of decode steps; host memory.
typedef struct DecodeGraphs DecodeGraphs;

// One whole step of a batch in which every sequence has one new token, in few launches or one. What it
// writes is to the bit what the operations above write one after another.
typedef struct DecodeProblem {
    int num_layers;
    int hidden_size;
    int intermediate_size;
    int num_heads;
    int num_kv_heads;
    int max_seq_len;  // of any step, and the most sequences of one
    int max_num_seqs;
    float eps;
    const DecodeLayer *layers;  // [num_layers], on the host
    Matrix embed_tokens;
    Matrix lm_head;
    const bf16 *norm;        // [hidden_size]
    const bf16 *rope_table;  // [max_positions, head_dim]
    bf16 *residual;          // [max_num_tokens, hidden_size]: activations, as in model.h
    bf16 *q;                 // [max_num_tokens, num_heads, head_dim]
    bf16 *k;                 // [max_num_tokens, num_kv_heads, head_dim]
    bf16 *v;                 // [max_num_tokens, num_kv_heads, head_dim]
    bf16 *attn;              // [max_num_tokens, num_heads, head_dim]
    bf16 *act;               // [max_num_tokens, intermediate_size]
    float *logits;           // [num_seqs, vocab_size]
    int32_t *next_ids;       // [num_seqs]
    void *workspace;         // decode_workspace_bytes, zeroed once
    DecodeGraphs *graphs;    // opened once for this problem, or null: launches are not recorded
} DecodeProblem;

// Bytes that decode_step needs, or 0 where it does not serve such a model.
typedef Status DecodeWorkspaceBytes(size_t *bytes, const DecodeProblem *problem);
typedef Status OpenDecodeGraphs(DecodeGraphs **graphs);
typedef void CloseDecodeGraphs(DecodeGraphs *graphs);  // null allowed
typedef int DecodeMaxSeqs(void);                       // most sequences of a step that decode_step takes
// With `advance`, also prepares the next step where this one found its input: each sequence's arg-max
// becomes its input id, its length and position grow by one (slot_mapping is left: this operation derives
// slots itself).
typedef Status DecodeStep(const DecodeProblem *problem, const BatchIndex *batch, int advance,
                          Stream stream);

// The parts of the contract that have no operation of their own, exposed for proof.
typedef Status TensorCoreStep(float *d, const float *c, const bf16 *a, const bf16 *b, int64_t n,
                              Stream stream);
typedef Status Exp2(float *out, const float *x, int64_t n, Stream stream);

typedef struct Kernels {
    const char *name;
    OpenStream *open_stream;
    CloseStream *close_stream;
    Alloc *alloc;
    Free *free;
    CopyIn *copy_in;
    CopyOut *copy_out;
    Synchronize *synchronize;
    FreeMemory *free_memory;
    PackedBytes *packed_bytes;
    PackWeight *pack_weight;
    UnpackWeight *unpack_weight;
    Embedding *embedding;
    GatherRows *gather_rows;
    RmsNorm *rms_norm;
    Linear *linear;
    LinearF32 *linear_f32;
    RotaryEmbedding *rotary_embedding;
    WriteKvCache *write_kv_cache;
    ReadKvCache *read_kv_cache;
    FillBlock *fill_block;
    Attention *attention;
    SiluAndMul *silu_and_mul;
    ResidualAdd *residual_add;
    Argmax *argmax;
    EditLogits *edit_logits;
    RestoreLogits *restore_logits;
    Sample *sample;
    ScoreTokens *score_tokens;
    TensorCoreStep *tensor_core_step;
    Exp2 *exp2;
    // What fuses others; null where a backend has none.
    LinearAdd *linear_add;
    GatedLinear *gated_linear;
    QkvLinear *qkv_linear;
    FusedMinTokens *fused_min_tokens;
    DecodeWorkspaceBytes *decode_workspace_bytes;
    OpenDecodeGraphs *open_decode_graphs;
    CloseDecodeGraphs *close_decode_graphs;
    DecodeMaxSeqs *decode_max_seqs;
    DecodeStep *decode_step;
} Kernels;

// The tables: the CPU's is always there; without CUDA in the build, cuda_kernels() fails and says so.
const Kernels *twin_kernels(void);
Status cuda_kernels(const Kernels **kernels);

OpenStream twin_open_stream, cuda_open_stream;
CloseStream twin_close_stream, cuda_close_stream;
Alloc twin_alloc, cuda_alloc;
Free twin_free, cuda_free;
CopyIn twin_copy_in, cuda_copy_in;
CopyOut twin_copy_out, cuda_copy_out;
Synchronize twin_synchronize, cuda_synchronize;
FreeMemory twin_free_memory, cuda_free_memory;
PackedBytes twin_packed_bytes, cuda_packed_bytes;
PackWeight twin_pack_weight, cuda_pack_weight;
UnpackWeight twin_unpack_weight, cuda_unpack_weight;
Embedding twin_embedding, cuda_embedding;
GatherRows twin_gather_rows, cuda_gather_rows;
RmsNorm twin_rms_norm, cuda_rms_norm;
Linear twin_linear, cuda_linear;
LinearF32 twin_linear_f32, cuda_linear_f32;
RotaryEmbedding twin_rotary_embedding, cuda_rotary_embedding;
WriteKvCache twin_write_kv_cache, cuda_write_kv_cache;
ReadKvCache twin_read_kv_cache, cuda_read_kv_cache;
FillBlock twin_fill_block, cuda_fill_block;
Attention twin_attention, cuda_attention;
SiluAndMul twin_silu_and_mul, cuda_silu_and_mul;
ResidualAdd twin_residual_add, cuda_residual_add;
Argmax twin_argmax, cuda_argmax;
EditLogits twin_edit_logits, cuda_edit_logits;
RestoreLogits twin_restore_logits, cuda_restore_logits;
Sample twin_sample, cuda_sample;
ScoreTokens twin_score_tokens, cuda_score_tokens;
TensorCoreStep twin_tensor_core_step, cuda_tensor_core_step;
Exp2 twin_exp2, cuda_exp2;
LinearAdd cuda_linear_add;
GatedLinear cuda_gated_linear;
QkvLinear cuda_qkv_linear;
FusedMinTokens cuda_fused_min_tokens;
DecodeWorkspaceBytes cuda_decode_workspace_bytes;
OpenDecodeGraphs cuda_open_decode_graphs;
CloseDecodeGraphs cuda_close_decode_graphs;
DecodeMaxSeqs cuda_decode_max_seqs;
DecodeStep cuda_decode_step;
