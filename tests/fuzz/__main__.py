"""`python -m fuzz`."""

from fuzz.runner import main

main()
