// status.h -- how an error travels: a code through the return value, its words through one thread-local
// message.

#pragma once
#include "../include/engine.h"

// Record the message and return the code, so that a check is one line: return fail(STATUS_…, "…", …).
Status fail(Status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Leave the function with the status of a call that failed. One of the project's two macros.
#define TRY(call)                                       \
    do {                                                \
        Status try_status = (call);                     \
        if (try_status != STATUS_OK) return try_status; \
    } while (0)
