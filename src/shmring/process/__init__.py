"""Processes: proof of death, peers of a wait, the registry with heartbeats, exit and fork."""
