"""Tasks handed to worker processes, each answered once: what pool and coordinator stand on."""
