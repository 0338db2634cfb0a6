"""The compiled floor: bytes in shared memory, reached by a file descriptor; it knows no names."""
