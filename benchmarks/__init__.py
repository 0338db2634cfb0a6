"""shmring beside what the standard library has, on the same work.

``make bench`` runs the ``bench_*.py`` files, one question each, with
pytest-benchmark, and ``make bench-peers`` the same beside packages from PyPI;
``python -m benchmarks.figures`` prints the figures the project promises.  All
take turns, run by run, so that a drift of the machine is nobody's advantage.

    work.py        what is sent, and how its arrival is checked
    adapters.py    how it is sent: each transport behind the same few names
    peers.py       the same for what comes from PyPI
    transports.py  all of them, by what they can carry
    sessions.py    who sends it to whom, and when the clock runs
    turns.py       whose run it is
    curves.py      rates by size and by processes, round trips: results/curves.json
    plots.py       the same as pictures
    scaling.py     rates, switches and system calls of many processes, busy and idle
    limits.py      what the machine allows (limits.c), and what share of it is reached
    budgets.py     how many instructions a call may cost; counting.py counts them
    guards.py      what each guard costs, counted in the same way
    costs.py       what a queue costs that does nothing, or whose users were killed
    recovery.py    how soon, and how fast, the others go on after a kill
    dropin.py      what else a drop-in promises; its small program is hello.py

No speed is asserted anywhere: only wrong content is an error.
"""
