"""Diagnostics of shared memory; no decision depends on them."""
