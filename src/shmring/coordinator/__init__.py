"""Coordinator and workers that find each other by name."""
