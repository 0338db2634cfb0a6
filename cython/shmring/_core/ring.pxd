"""RingCore: fields and methods; outcomes, flags, items and takes."""

from cython cimport final
from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmring._core.area cimport File, Mapping
from shmring._core.block cimport BlockSpace
from shmring._core.layout cimport Block, Claim, Header
from shmring._core.sync cimport current_cpu, load_relaxed32, store_relaxed32

cdef enum Outcome:
    DONE = 0
    BUSY  # the lock was not to be had in time
    FULL  # no room for the bytes
    FULL_COUNT  # max_messages are in the ring
    EMPTY
    BEHIND_LEASE  # the message in front is leased by a peek
    BEHIND_RESERVATION  # the message in front is being written in place
    PARTIAL  # only the head fitted the room given; nothing was taken
    CHANGED  # the message in front is not the expected one
    SHUT  # shut down
    CORRUPT
    CLAIM_HELD  # the previous claim was not released
    LENT  # as DONE, and `take.lent` says which blocks are this process's now
    # any negative number is an errno

cdef enum Flag:
    MAY_WAIT = 1  # the GIL is released: wait for the lock up to a slice
    MAY_GROW = 2
    IS_WAITING = 4  # announce what this producer needs
    BRIEFLY = 8  # wait for the lock, a millisecond at most

cdef enum:
    CPU_BYTES = 1024  # written between two looks at the CPU: a look costs a tenth of a put

cdef enum Poison:
    POISON_POSITIONS = 1
    POISON_FRAME = 2
    POISON_AREA = 3

cdef enum:
    LENT_MOST = 16  # blocks that one message names at most

cdef struct Segment:
    char *data
    uint64_t length

# The blocks that a message on its way names: the sender's until it is put.
cdef struct Lending:
    BlockSpace *space
    int count
    int indices[LENT_MOST]
    bint sent
    uint32_t epoch  # of the process that holds them

# A block that came with a message.
cdef struct Lent:
    int index
    uint64_t length  # of what it holds

# A message to put: its segments are laid one behind the other.  With an owner
# it is a reservation, whose payload the owner writes after the lock is released.
cdef struct Item:
    Segment *segments
    int count
    uint32_t kind
    uint64_t length  # sum over the segments
    uint64_t owner  # 0, or the owner of the reservation
    Lending *lending  # or NULL
    Mapping *mapping  # of a reservation: a reference that the caller releases
    char *payload

# A message to take, and what was found out about the one in front.
cdef struct Take:
    char *room  # receives the whole message, or its head
    uint64_t room_bytes
    Segment *targets  # if any: the message goes here instead,
    int target_count
    uint64_t expected  # provided that it still is the one at this position
    uint64_t leaser  # 0, or the owner of a lease, made instead of a copy
    Mapping *mapping  # of a lease: a reference that the caller releases
    char *payload
    uint64_t position
    uint64_t length
    uint64_t owner  # of the lease or reservation in the way
    uint32_t kind
    uint32_t state  # of the frame
    BlockSpace *space  # of what was lent: a reference that the caller leaves
    int lent_count
    Lent lent[LENT_MOST]

# The process's list of spaces is this module's.
cdef void leave_blocks(BlockSpace *space) noexcept nogil
cdef void return_block(BlockSpace *space, int index, char *data, uint64_t capacity, uint32_t epoch,
                       uint64_t owner) noexcept nogil

cdef class RingCore:
    cdef Header *header
    cdef int fd
    cdef File file  # device and inode, to notice a descriptor that was closed behind us
    # under the producers' lock
    cdef Mapping *producer_mapping
    cdef Mapping *producer_stale  # unmapped after unlocking
    cdef uint64_t known_read  # a read_position seen earlier
    # under the consumers' lock
    cdef Mapping *consumer_mapping
    cdef Mapping *consumer_stale
    cdef uint64_t known_limit  # bytes up to here are committed and in this area
    cdef uint64_t left_at  # where this handle's last take ended; atomic: others take too if consumers stand elsewhere
    # what both mappings hold: atomics, readable without their locks
    cdef uint64_t write_capacity
    cdef uint64_t read_capacity
    cdef BlockSpace *space  # the blocks, once there are any and this handle met one
    cdef bint adopts  # it takes messages that name blocks
    cdef Claim *claim  # where this handle claims what it takes, or NULL
    # of the handle
    cdef uint64_t oversized  # atomic: a get found the ring empty and far too large: what would do
    cdef object __weakref__

    # one attempt each: lock, look, copy, commit, unlock, wake
    cdef int put_items(self, Item *items, Py_ssize_t count, Py_ssize_t *done,
                       uint64_t *position, int flags) noexcept nogil
    cdef int take(self, Take *take, int flags) noexcept nogil
    cdef int probe(self, Take *found, int flags) noexcept nogil
    cdef int take_span(self, char *room, uint64_t room_bytes, Py_ssize_t most, uint64_t stop,
                       uint64_t *bytes, int flags) noexcept nogil
    cdef int finish_reservation(self, char *payload, uint64_t position, bint commit) noexcept nogil
    cdef int finish_lease(self, uint64_t position, uint64_t length, bint consume, int flags) noexcept nogil
    # what is done beside: the slow path
    cdef int lock_producers(self, int flags) noexcept nogil
    cdef void unlock_producers(self) noexcept nogil
    cdef int lock_consumers(self, int flags) noexcept nogil
    cdef void unlock_consumers(self) noexcept nogil
    cdef void wake_producers(self) noexcept nogil
    cdef void give_up_space(self) noexcept nogil
    cdef void wake_next(self) noexcept nogil
    cdef void note_empty(self, uint64_t pos) noexcept nogil
    cdef void clear_the_way(self, Take *found, int outcome, int flags) noexcept nogil
    cdef void shrink(self, uint64_t capacity, int flags) noexcept nogil
    cdef uint64_t myself(self) noexcept nogil
    cdef void unmap(self)
    cdef int find_blocks(self) noexcept nogil
    # inside: called directly, not through the table of methods
    @final
    cdef int put_locked(self, Item *items, Py_ssize_t count, Py_ssize_t *done,
                        uint64_t *position, int flags) noexcept nogil
    @final
    cdef int make_room(self, uint64_t pos, uint64_t span, uint64_t following, int flags) noexcept nogil
    @final
    cdef uint64_t starved_name(self) noexcept nogil
    @final
    cdef int lock_slowly(self, uint32_t *word, int tried, int flags) noexcept nogil
    @final
    cdef int recover_producers(self) noexcept nogil
    @final
    cdef int recover_consumers(self) noexcept nogil
    @final
    cdef int first_frame(self, Take *take) noexcept nogil
    @final
    cdef const Block *blocks(self) noexcept nogil
    @final
    cdef int look_further(self, uint64_t pos) noexcept nogil
    @final
    cdef void commit_read(self, uint64_t pos, uint64_t count) noexcept nogil
    @final
    cdef bint claim_is_held(self) noexcept nogil
    @final
    cdef void take_leave(self, uint64_t following, uint64_t count) noexcept nogil
    @final
    cdef void wake_consumers(self) noexcept nogil
    @final
    cdef int poison(self, uint32_t reason) noexcept nogil


# Of a producer; stored when it changed, since the other producers and the consumers have the line.
cdef inline void note_cpu(Header *h) noexcept nogil:
    cdef uint32_t cpu = current_cpu()
    if load_relaxed32(&h.producer_cpu) != cpu:
        store_relaxed32(&h.producer_cpu, cpu)
