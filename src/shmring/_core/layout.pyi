"""The layout as numbers, for those who look at a header from Python."""

LAYOUT: dict[str, int]
