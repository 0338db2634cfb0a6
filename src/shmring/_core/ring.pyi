"""Layout of a ring, its locks and frames, and the proof of death."""

LAYOUT: dict[str, int]

def is_dead(pid: int, start_ticks: int, /) -> bool: ...

class RingCore: ...
