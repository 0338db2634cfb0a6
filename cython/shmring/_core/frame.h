/* The head of a frame: how it is written, and what it must say to be believed. */
#ifndef SHMRING_FRAME_H
#define SHMRING_FRAME_H

#include "layout.h"
#include "sync.h"

/* No process looks at it before its position is committed. */
static inline void frame_begin(shmring_frame *frame, uint64_t position, uint64_t length, uint32_t kind,
                               uint32_t state, uint64_t owner)
{
    frame->position = position;
    frame->length = length;
    frame->kind = kind;
    frame->state = state;
    frame->owner = owner;
}

/* May a message of `length` bytes, read from this head once, stand at `position` of an
 * area of `capacity` bytes, whose committed data ends at `limit`? */
static inline int frame_is_possible(const shmring_frame *frame, uint64_t length, uint64_t position,
                                    uint64_t capacity, uint64_t limit)
{
    return load_relaxed64(&frame->position) == position && length <= capacity - SHMRING_FRAME_BYTES
        && shmring_frame_span(length) <= limit - position;
}

#endif
