"""shmring beside what the standard library has, on the same work.

``make bench`` runs the ``bench_*.py`` files, one question each, with
pytest-benchmark; ``python -m benchmarks.figures`` prints the figures the
project promises, with the runs of both sides interleaved: quote those.  Under
pytest each transport has its rounds in a row, so that a drift of the machine
looks like a difference.

    work.py       what is sent, and how its arrival is checked
    adapters.py   how it is sent: each transport behind the same few names
    sessions.py   who sends it to whom, and when the clock runs
    costs.py      what a queue costs that does nothing, or whose users were killed
    recovery.py   how soon, and how fast, the others go on after a kill
    dropin.py     what else a drop-in promises; its small program is hello.py

A new peer is one class in ``adapters.py``.  No speed is asserted anywhere:
only wrong content is an error.
"""
