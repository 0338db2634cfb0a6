"""Read-only observer of shared memory: rings, queues, registries and pools of this user."""
