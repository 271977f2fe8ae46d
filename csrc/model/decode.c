// decode.c -- steps in which every sequence has one new token, through the backend's fused step.
//
// The same bits as forward.c, operation by operation; a batch that the fused step does not take goes there.
//
// See       kernels/decode_step.cu, tests/system/test_fused_decode.py

#include "model.h"

int decode_applies(const Model *model, const BatchIndex *batch) {
    return model->decode.workspace && batch->max_seq_len_q == 1 && batch->num_logits == batch->num_seqs &&
           batch->num_seqs <= model->kernels->decode_max_seqs();
}

Status decode_forward(Model *model, const BatchIndex *batch, int steps_before, int num_steps,
                      const EngineSampling *sampling, float *logits, int32_t *next_ids) {
    const Kernels *k = model->kernels;
    Activations *a = &model->activations;
    Stream stream = model->stream;
    DecodeProblem problem = model->decode;
    BatchIndex longest = *batch;
    longest.max_seq_len += steps_before + num_steps - 1;
    for (int step = 0; step < num_steps; step++) {
        problem.next_ids = a->next_ids + (size_t)step * batch->num_seqs;
        TRY(k->decode_step(&problem, &longest, 1, stream));
    }
    if (logits)
        TRY(k->copy_out(logits, a->logits,
                        (size_t)batch->num_seqs * model->config.vocab_size * sizeof(float), stream));
    if (sampling) return model_choose(model, sampling, 0, batch->num_seqs, next_ids);
    model->chosen = (Chosen){.num_rows = num_steps * batch->num_seqs, .next_ids = next_ids};
    return STATUS_OK;
}
