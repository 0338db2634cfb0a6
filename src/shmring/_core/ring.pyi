"""The ring's machinery."""

LAYOUT: dict[str, int]

class RingCore: ...
