"""Mutated shared memory and mutated payloads, read by every operation.

`mutations` says what is changed, `scenes` what a file looked like before, `drivers` what is
then called and what may come of it, `runner` runs drivers in children and counts.  By hand::

    python -m fuzz --reads 1000000            # from tests/, or with tests/ in PYTHONPATH
    python -m fuzz --only ring --seed 7:1234  # one batch again, as a crash names it

`make asan` runs it over an instrumented build, `test_fuzz.py` a short version over the usual one.
"""
