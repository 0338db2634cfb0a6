"""How long to wait, and for whose sake; nothing of it is visible from Python."""
