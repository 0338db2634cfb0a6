"""The ring's machinery; of its one class nothing is visible from Python."""

LAYOUT: dict[str, int]

class RingCore: ...
