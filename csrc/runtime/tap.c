// tap.c -- named values of the forward pass, copied out, and replaced where the caller asks.

#include "../model/model.h"

int tap_width(const EngineModelConfig *c, TapPoint point) {
    switch (point) {
        case TAP_Q:
        case TAP_Q_ROPE:
        case TAP_ATTN:
            return c->num_heads * c->head_dim;
        case TAP_K:
        case TAP_V:
        case TAP_K_ROPE:
            return c->num_kv_heads * c->head_dim;
        case TAP_GATE:
        case TAP_UP:
        case TAP_ACT:
            return c->intermediate_size;
        case TAP_LOGITS:
            return c->vocab_size;
        default:
            return c->hidden_size;
    }
}

int tap_value_size(TapPoint point) {
    return point == TAP_LOGITS ? (int)sizeof(float) : (int)sizeof(bf16);
}

Status tap_rows(const Model *model, const TapSet *set, TapPoint point, int layer, void *value,
                int first_row, int num_rows) {
    size_t row_bytes = (size_t)tap_width(&model->config, point) * tap_value_size(point);
    for (int i = 0; i < set->num_taps; i++) {
        const EngineTap *tap = &set->taps[i];
        if (tap->point != (int32_t)point || tap->layer != layer) continue;
        if (tap->out)
            TRY(model->kernels->copy_out((char *)tap->out + first_row * row_bytes, value,
                                         num_rows * row_bytes, model->stream));
        if (tap->force)
            TRY(model->kernels->copy_in(value, (const char *)tap->force + first_row * row_bytes,
                                        num_rows * row_bytes, model->stream));
    }
    return STATUS_OK;
}
