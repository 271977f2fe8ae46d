// attention.c -- causal attention over a paged cache: tiles on absolute positions, folded in one order.
//
//   per tile: r = q Kᵀ, m = max(r) scale, P = bf16(exp2(r scale - m)), l = sum P, O = P V
//   then fold (m, l, O)
//
// Shapes    q, out [num_tokens, num_heads, head_dim]; cache as in KvLayer; bf16
// Rounding  scores, m, l, O in float32; P and the result to bf16
// Mapping   one task per sequence, kv head and run of query tokens;
//           rows = query tokens x heads of the group
// Source    docs/numerics.md section 4; Milakov & Gimelshein, arXiv:1805.02867 (the fold)
// See       kernels/attention_*.cu, tests/twin/test_attention.py

#include "exp2.h"
#include "kv_cache.h"
#include "tensor_core.h"
#include "threads.h"

enum {
    HEAD_DIM = 64,
    MAX_ROWS = 192,  // rows of a task
    KEY_PANELS = NUMERICS_TILE / PANEL_LANES,
    KEY_STEPS = NUMERICS_TILE / NUMERICS_STEP,
    DIM_PANELS = HEAD_DIM / PANEL_LANES,
    DIM_STEPS = HEAD_DIM / NUMERICS_STEP,
};

// A partial softmax over some keys: their maximum score, the sum of P, and P V; empty before the first.
typedef struct Partial {
    int is_empty;
    float max;
    float sum;
    float out[HEAD_DIM];
} Partial;

typedef struct AttentionScratch {
    Panel keys[KEY_PANELS][DIM_STEPS];
    Panel values[KEY_STEPS][DIM_PANELS];
    float q_value[MAX_ROWS][HEAD_DIM];
    int32_t q_exponent[MAX_ROWS][HEAD_DIM];
    float score[MAX_ROWS][NUMERICS_TILE];
    float p_value[MAX_ROWS][NUMERICS_TILE];
    int32_t p_exponent[MAX_ROWS][NUMERICS_TILE];
    float tile_out[MAX_ROWS][HEAD_DIM];
    Partial segment[MAX_ROWS];
    Partial row[MAX_ROWS];
    bf16 gathered[NUMERICS_TILE][HEAD_DIM];
} AttentionScratch;

_Static_assert(sizeof(AttentionScratch) <= TWIN_SCRATCH_BYTES, "a task's scratch must fit a thread's");

typedef struct AttentionArguments {
    bf16 *out;
    const bf16 *q;
    const KvLayer *cache;
    const BatchIndex *batch;
    int num_heads;
    int tokens_per_task;
} AttentionArguments;

// Where a task works: its sequence, kv head and query tokens.
typedef struct TaskPlace {
    int sequence;
    int kv_head;
    int first_token;  // row of the batch
    int num_tokens;
} TaskPlace;

static int tasks_of_sequence(const AttentionArguments *args, int sequence) {
    const int32_t *cu = args->batch->cu_seqlens_q;
    int runs = (cu[sequence + 1] - cu[sequence] + args->tokens_per_task - 1) / args->tokens_per_task;
    return runs * args->cache->num_kv_heads;
}

static TaskPlace place_of_task(const AttentionArguments *args, int64_t index) {
    int sequence = 0;
    for (; index >= tasks_of_sequence(args, sequence); sequence++)
        index -= tasks_of_sequence(args, sequence);
    int num_kv_heads = args->cache->num_kv_heads;
    int end = args->batch->cu_seqlens_q[sequence + 1];
    int first = args->batch->cu_seqlens_q[sequence] + (int)(index / num_kv_heads) * args->tokens_per_task;
    int num_tokens = end - first < args->tokens_per_task ? end - first : args->tokens_per_task;
    return (TaskPlace){sequence, (int)(index % num_kv_heads), first, num_tokens};
}

static int length_of_sequence(const AttentionArguments *args, const TaskPlace *place) {
    return args->batch->seq_lens[place->sequence];
}

// K and V of one tile into panels; positions that hold no token of this sequence count as zero.
static void load_tile(AttentionScratch *s, const AttentionArguments *args, const TaskPlace *place,
                      int tile) {
    const KvLayer *cache = args->cache;
    const BatchIndex *batch = args->batch;
    const int32_t *block_table = batch->block_tables + (size_t)place->sequence * batch->max_blocks_per_seq;
    int seq_len = length_of_sequence(args, place);
    for (int is_value = 0; is_value < 2; is_value++) {
        memset(s->gathered, 0, sizeof s->gathered);
        for (int j = 0; j < NUMERICS_TILE; j++) {
            int position = tile * NUMERICS_TILE + j;
            if (position >= seq_len) break;
            int slot = block_table[position / cache->block_size] * cache->block_size +
                       position % cache->block_size;
            const bf16 *vector =
                is_value ? v_vector(cache, slot, place->kv_head) : k_vector(cache, slot, place->kv_head);
            memcpy(s->gathered[j], vector, sizeof s->gathered[j]);
        }
        const bf16 *gathered = &s->gathered[0][0];
        if (is_value) {
            for (int step = 0; step < KEY_STEPS; step++)
                for (int panel = 0; panel < DIM_PANELS; panel++)
                    tensor_core_decode_panel(
                        &s->values[step][panel],
                        gathered + step * NUMERICS_STEP * HEAD_DIM + panel * PANEL_LANES, HEAD_DIM, 1);
        } else {
            for (int panel = 0; panel < KEY_PANELS; panel++)
                for (int step = 0; step < DIM_STEPS; step++)
                    tensor_core_decode_panel(
                        &s->keys[panel][step],
                        gathered + panel * PANEL_LANES * HEAD_DIM + step * NUMERICS_STEP, 1, HEAD_DIM);
        }
    }
}

// The row sum of P in the order in which four neighbouring threads of a GPU hold it.
static float quad_sum(const float *p) {
    float quad[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < NUMERICS_TILE; i += 8)
        for (int q = 0; q < 4; q++) quad[q] += p[i + 2 * q] + p[i + 2 * q + 1];
    return (quad[0] + quad[1]) + (quad[2] + quad[3]);
}

// P of one row from its scores; only the first num_keys keys are allowed. Returns its maximum and sum.
FMA_CLONES static Partial softmax_row(float *p_value, int32_t *p_exponent, const float *score, int num_keys,
                                      float scale) {
    float largest = score[0];
    for (int j = 1; j < num_keys; j++) largest = score[j] > largest ? score[j] : largest;
    Partial tile = {0, largest * scale, 0.0f, {0}};
    bf16 p[NUMERICS_TILE] = {0};
    for (int j = 0; j < num_keys; j++)
        p[j] = bf16_from_float(contract_exp2(fmaf(score[j], scale, -tile.max)));
    tensor_core_decode(p_value, p_exponent, p, NUMERICS_TILE);
    tile.sum = quad_sum(p_value);
    return tile;
}

FMA_CLONES static void fold(Partial *into, const Partial *next) {
    if (into->is_empty) {
        *into = *next;
        return;
    }
    float max = into->max > next->max ? into->max : next->max;
    float a = contract_exp2(into->max - max);
    float b = contract_exp2(next->max - max);
    into->max = max;
    into->sum = fmaf(next->sum, b, into->sum * a);
    for (int d = 0; d < HEAD_DIM; d++) into->out[d] = fmaf(next->out[d], b, into->out[d] * a);
}

static void attend_to_tile(AttentionScratch *s, const AttentionArguments *args, const TaskPlace *place,
                           int tile, int first_row, int num_rows, float scale) {
    int group = args->num_heads / args->cache->num_kv_heads;
    // Nothing is computed for keys that are no token's: no score of theirs is read, P and V are zero there.
    int num_tile_keys = length_of_sequence(args, place) - tile * NUMERICS_TILE;
    if (num_tile_keys > NUMERICS_TILE) num_tile_keys = NUMERICS_TILE;
    memset(s->score[first_row], 0, (size_t)num_rows * sizeof s->score[0]);
    memset(s->tile_out[first_row], 0, (size_t)num_rows * sizeof s->tile_out[0]);
    for (int panel = 0; panel * PANEL_LANES < num_tile_keys; panel++)
        for (int step = 0; step < DIM_STEPS; step++)
            tensor_core_step_rows(&s->score[first_row][panel * PANEL_LANES], NUMERICS_TILE,
                                  &s->q_value[first_row][step * NUMERICS_STEP],
                                  &s->q_exponent[first_row][step * NUMERICS_STEP], HEAD_DIM, num_rows,
                                  &s->keys[panel][step]);
    Partial tiles[MAX_ROWS];
    for (int row = first_row; row < first_row + num_rows; row++) {
        int position = args->batch->positions[place->first_token + row / group];
        int num_keys = position + 1 - tile * NUMERICS_TILE;
        if (num_keys > NUMERICS_TILE) num_keys = NUMERICS_TILE;
        tiles[row] = softmax_row(s->p_value[row], s->p_exponent[row], s->score[row], num_keys, scale);
    }
    for (int step = 0; step * NUMERICS_STEP < num_tile_keys; step++)
        for (int panel = 0; panel < DIM_PANELS; panel++)
            tensor_core_step_rows(&s->tile_out[first_row][panel * PANEL_LANES], HEAD_DIM,
                                  &s->p_value[first_row][step * NUMERICS_STEP],
                                  &s->p_exponent[first_row][step * NUMERICS_STEP], NUMERICS_TILE, num_rows,
                                  &s->values[step][panel]);
    for (int row = first_row; row < first_row + num_rows; row++) {
        memcpy(tiles[row].out, s->tile_out[row], sizeof tiles[row].out);
        if (tile % NUMERICS_SEGMENT == 0 && !s->segment[row].is_empty) {
            fold(&s->row[row], &s->segment[row]);
            s->segment[row].is_empty = 1;
        }
        fold(&s->segment[row], &tiles[row]);
    }
}

static void attention_task(const void *arguments, int64_t index, void *scratch) {
    const AttentionArguments *args = arguments;
    AttentionScratch *s = scratch;
    TaskPlace place = place_of_task(args, index);
    int group = args->num_heads / args->cache->num_kv_heads;
    int num_rows = place.num_tokens * group;
    float scale = (float)(1.4426950408889634074 / sqrt((double)HEAD_DIM));

    for (int row = 0; row < num_rows; row++) {
        size_t token = (size_t)place.first_token + row / group;
        const bf16 *q =
            args->q + (token * args->num_heads + (size_t)place.kv_head * group + row % group) * HEAD_DIM;
        tensor_core_decode(s->q_value[row], s->q_exponent[row], q, HEAD_DIM);
        s->segment[row].is_empty = s->row[row].is_empty = 1;
    }
    const int32_t *positions = args->batch->positions + place.first_token;
    int last_tile = positions[place.num_tokens - 1] / NUMERICS_TILE;
    for (int tile = 0; tile <= last_tile; tile++) {
        int first_row = 0;  // positions ascend: rows before this one end before the tile begins
        while (positions[first_row / group] < tile * NUMERICS_TILE) first_row += group;
        load_tile(s, args, &place, tile);
        attend_to_tile(s, args, &place, tile, first_row, num_rows - first_row, scale);
    }
    for (int row = 0; row < num_rows; row++) {
        fold(&s->row[row], &s->segment[row]);
        float inverse = 1.0f / s->row[row].sum;
        size_t token = (size_t)place.first_token + row / group;
        bf16 *out =
            args->out + (token * args->num_heads + (size_t)place.kv_head * group + row % group) * HEAD_DIM;
        for (int d = 0; d < HEAD_DIM; d++) out[d] = bf16_from_float(s->row[row].out[d] * inverse);
    }
}

Status twin_attention(bf16 *out, const bf16 *q, const KvLayer *cache, const BatchIndex *batch,
                      int num_heads, Stream stream) {
    int group = num_heads / cache->num_kv_heads;
    AttentionArguments arguments = {out,   q,         cache,
                                    batch, num_heads, MAX_ROWS / group < 32 ? MAX_ROWS / group : 32};
    int64_t num_tasks = 0;
    for (int i = 0; i < batch->num_seqs; i++) num_tasks += tasks_of_sequence(&arguments, i);
    parallel_for(stream, num_tasks, attention_task, &arguments);
    return STATUS_OK;
}
