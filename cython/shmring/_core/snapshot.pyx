"""What stands in a ring's header, for those who look: facts, as numbers.

`shmring.diagnostics.snapshot` says in words what they mean.  Everything here may be old by
the time it is read, and whatever names a process was written by that process:
it is shown, and nothing is decided by it.
"""

from libc.stdint cimport uint32_t, uint64_t

from shmring._core.ring cimport BEHIND_RESERVATION, BRIEFLY, Take
from shmring._core.count cimport count_read
from shmring._core.handle cimport RingHandle
from shmring._core.layout cimport (
    SHMRING_DEATH_COUNT, SHMRING_WAITER_COUNT, Death, Header, Waiter, shmring_area_of,
)
from shmring._core.owner cimport owner_is_dead, owner_pid, owner_start_ticks
from shmring._core.sync cimport (
    compare_exchange64, load_acquire32, load_acquire64, load_relaxed32, lock_is_orphan, lock_owner,
    sync_start,
)
from shmring._core.wait cimport glance
from shmring._core.diagnostics cimport (
    CALL_AIO, CALL_GET, CALL_JOIN, CALL_PEEK, CALL_PUT, CALL_RESERVE, CALL_WAIT, FOR_LEASE, FOR_LOCK, FOR_MESSAGE,
    FOR_RESERVATION, FOR_ROOM, FOR_TASKS, HELD_CONSUMER_LOCK, HELD_LEASE, HELD_PRODUCER_LOCK, HELD_RESERVATION,
    witness_holder,
)

sync_start()  # _core has checked that the kernel can do it

CALLS = {
    CALL_GET: "get", CALL_PEEK: "peek", CALL_PUT: "put", CALL_RESERVE: "reserve", CALL_JOIN: "join",
    CALL_WAIT: "wait", CALL_AIO: "aget or aput",
}
REASONS = {
    FOR_MESSAGE: "a message", FOR_ROOM: "room", FOR_LOCK: "a lock", FOR_LEASE: "the end of a peek",
    FOR_RESERVATION: "the end of a reserve", FOR_TASKS: "task_done",
}
HELD = {
    HELD_PRODUCER_LOCK: "the producers' lock", HELD_CONSUMER_LOCK: "the consumers' lock",
    HELD_RESERVATION: "a reserve", HELD_LEASE: "a peek",
}


def user_kind(RingHandle ring):
    """Which class laid it out: 1 is Ring, 2 one of the queues."""
    ring.enter()
    try:
        return ring.header.user_kind
    finally:
        ring.leave()


def counters(RingHandle ring):
    """The fields of RingStatistics that are numbers and flags."""
    cdef Header *h
    ring.enter()
    try:
        h = ring.header
        return {
            "capacity": shmring_area_of(h, load_acquire64(&h.write_generation)).capacity,
            "max_capacity": h.max_capacity,
            "used_bytes": (0 if load_acquire32(&h.shutdown) == 2
                           else load_acquire64(&h.write_position) - load_acquire64(&h.read_position)),
            "messages": ring._qsize(),
            "messages_put": count_read(&h.put_count, &h.write_position),
            "messages_taken": count_read(&h.get_count, &h.read_position),
            "bytes_put": load_acquire64(&h.write_position),
            "growths": load_acquire64(&h.write_generation),
            "recoveries": load_relaxed32(&h.recoveries),
            "consumers_waiting": load_relaxed32(&h.data_wait) & 1 != 0,
            "producers_waiting": load_relaxed32(&h.space_wait) & 1 != 0,
            "shut_down": load_relaxed32(&h.shutdown) != 0,
            "poisoned": load_relaxed32(&h.poisoned) != 0,
        }
    finally:
        ring.leave()


def waiters(RingHandle ring):
    """[(pid, start ticks, thread, call, reason, since in ns)] of the living.

    The records of the dead are given free.
    """
    cdef Waiter *waiter
    cdef uint64_t owner, since
    cdef uint32_t thread, call, reason
    cdef uint64_t i
    cdef list found = []
    ring.enter()
    try:
        for i in range(SHMRING_WAITER_COUNT):
            waiter = &ring.header.waiters[i]
            owner = load_acquire64(&waiter.owner)
            since = load_acquire64(&waiter.since_ns)
            thread = load_relaxed32(&waiter.thread)
            call = load_relaxed32(&waiter.call)
            reason = load_relaxed32(&waiter.reason)
            if owner == 0 or since == 0 or since != load_acquire64(&waiter.since_ns):
                continue
            if owner_is_dead(owner):
                compare_exchange64(&waiter.owner, owner, 0)
            else:
                found.append((owner_pid(owner), owner_start_ticks(owner), thread, call, reason, since))
    finally:
        ring.leave()
    return found


def holders(RingHandle ring):
    """[(pid, start ticks or 0, thread or 0, held, died)] at this moment."""
    cdef list found = []
    ring.enter()
    try:
        # first, because a glance at the front recovers the consumers' lock
        add_lock(found, HELD_PRODUCER_LOCK, &ring.header.producer_lock)
        add_lock(found, HELD_CONSUMER_LOCK, &ring.header.consumer_lock)
        add_owner(found, HELD_LEASE, load_acquire64(&ring.header.lease_owner))
        add_owner(found, HELD_RESERVATION, front_reserver(ring))
    finally:
        ring.leave()
    return found


cdef int add_lock(list found, int held, const uint32_t *word) except -1:
    cdef uint32_t pid = witness_holder(word)
    cdef uint32_t seen = load_acquire32(word)
    if lock_is_orphan(seen):
        found.append((pid, 0, 0, held, True))
    elif lock_owner(seen) != 0:
        # until he has shown his pid, take him for the first thread of his process
        found.append((pid if pid != 0 else lock_owner(seen), 0, lock_owner(seen), held, False))
    return 0


cdef int add_owner(list found, int held, uint64_t owner) except -1:
    if owner != 0:
        found.append((owner_pid(owner), owner_start_ticks(owner), 0, held, owner_is_dead(owner)))
    return 0


cdef uint64_t front_reserver(RingHandle ring) except? 0:
    """Whose reservation stands in front; 0 if nobody's, or the lock is not to be had."""
    cdef Take front
    cdef int result
    if load_acquire64(&ring.header.write_position) == load_acquire64(&ring.header.read_position):
        return 0
    with nogil:
        result = glance(ring, &front, BRIEFLY)
    return front.owner if result == BEHIND_RESERVATION else 0


def deaths(RingHandle ring):
    """[(pid or 0, held, when in ns)]: who died last, for each thing that can be held."""
    cdef Death *death
    cdef uint64_t pid, when
    cdef int held
    cdef list found = []
    ring.enter()
    try:
        for held in range(<int>SHMRING_DEATH_COUNT):
            death = &ring.header.deaths[held]
            when = load_acquire64(&death.when_ns)
            pid = load_acquire64(&death.pid)
            if when != 0 and when == load_acquire64(&death.when_ns):
                found.append((pid, held, when))
    finally:
        ring.leave()
    return found
