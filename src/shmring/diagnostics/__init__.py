"""What goes on in shared memory, for people: nothing depends on it."""
