// status.c -- the thread's last message, and what this library was built from.

#include "../common/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "../common/numerics.h"

static _Thread_local char last_message[512];

Status fail(Status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_message, sizeof last_message, format, arguments);
    va_end(arguments);
    return status;
}

Status engine_last_error(const char **message) {
    if (!message) return fail(STATUS_INVALID_ARGUMENT, "message is null");
    *message = last_message;
    return STATUS_OK;
}

Status engine_build_info(EngineBuildInfo *info) {
    if (!info) return fail(STATUS_INVALID_ARGUMENT, "info is null");
    memset(info, 0, sizeof *info);
    info->abi_version = 4;
    info->has_cuda = BUILT_WITH_CUDA;
    info->model_config_size = sizeof(EngineModelConfig);
    info->engine_options_size = sizeof(EngineOptions);
    info->engine_batch_size = sizeof(EngineBatch);
    info->engine_tap_size = sizeof(EngineTap);
    info->engine_sampling_size = sizeof(EngineSampling);
    info->engine_sampling_row_size = sizeof(EngineSamplingRow);
    info->engine_logit_edit_size = sizeof(EngineLogitEdit);
    snprintf(info->source_stamp, sizeof info->source_stamp, "%s", SOURCE_STAMP);
    snprintf(info->numerics_version, sizeof info->numerics_version, "%s", numerics_version());
    return STATUS_OK;
}
