"""The ring's machinery."""

LAYOUT: dict[str, int]

def is_dead(pid: int, start_ticks: int, /) -> bool: ...

class RingCore: ...
