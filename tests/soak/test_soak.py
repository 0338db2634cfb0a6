"""Five seconds of the soak, and whether its accounts would notice what must not be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import accounts
from accounts import TORN, Accounts, CutGet, Gap, Intent, Receipts, Stream, unexplained
from flow import MILLISECOND, Flow
from workload import Parcel, read, runs_of, unwrap, wrap, write

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.fault(1, 2, 8, 9, 13)
def test_five_seconds_of_kills_and_stops_lose_nothing():
    done = subprocess.run(
        [sys.executable, str(SOAK), "--seconds", "5", "--seed", str(os.getpid())],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kills" in done.stdout
    assert "left in /dev/shm: 0 bytes" in done.stdout


# ---- messages -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 1000, 100_000])
@pytest.mark.parametrize("kind", range(3))
def test_a_message_says_what_it_is(length, kind):
    assert read(unwrap(wrap(write(3, 7, length), kind))) == (3, 7)


def test_one_bit_is_enough_to_be_torn():
    whole = write(3, 7, 100)
    for at in range(len(whole)):
        torn = bytearray(whole)
        torn[at] ^= 1
        assert read(torn)[0] == TORN
    assert read(whole[:-1])[0] == read(whole[:3])[0] == read(whole + b"x")[0] == TORN
    assert unwrap({"content": None}) == unwrap(Parcel(None)) == unwrap(5) == b""


def test_what_is_got_together_is_told_together():
    messages = [write(3, 7, 1), write(3, 8, 1), write(4, 9, 1), write(3, 9, 1), b"", b""]
    assert list(runs_of(messages)) == [(3, 7, 2), (4, 9, 1), (3, 9, 1), (TORN, 0, 1), (TORN, 0, 1)]


# ---- accounts -------------------------------------------------------------------------------


def test_what_came_twice_is_counted():
    stream = Stream(1, 0)
    for first, count in [(0, 2), (5, 2), (1, 1), (2, 4), (6, 3)]:
        stream.receive(first, count, 0, 0)
    assert (stream.duplicates, stream.received, stream.end) == (3, 9, 9)
    assert list(stream.gaps(9)) == []


def test_what_is_missing_has_a_time_in_which_it_was_taken():
    stream = Stream(1, 10)
    stream.receive(4, 1, 40, 45)
    stream.receive(2, 1, 30, 35)
    assert list(stream.gaps(7)) == [
        Gap(1, 0, 2, after=10, before=35),
        Gap(1, 3, 1, after=30, before=45),
        Gap(1, 5, 2, after=40, before=1 << 63),
    ]


def test_a_get_that_was_killed_explains_what_it_can_have_taken():
    first, second = Gap(1, 0, 2, after=10, before=20), Gap(2, 0, 1, after=12, before=15)
    assert unexplained([first], []) == [(first, 2)]
    assert unexplained([first], [CutGet(began=5, killed=11, most=1)]) == [(first, 1)]
    assert unexplained([first], [CutGet(began=5, killed=11, most=2)]) == []
    assert unexplained([first], [CutGet(began=1, killed=9, most=9)]) == [(first, 2)]
    assert unexplained([first], [CutGet(began=21, killed=30, most=9)]) == [(first, 2)]
    # the one that both could have had goes to the one that no other can explain
    both, one = CutGet(began=5, killed=13, most=1), CutGet(began=16, killed=30, most=2)
    assert unexplained([first, second], [both, one]) == []


def test_the_books_of_one_ring():
    accounts, intent, receipts = Accounts(), Intent(), Receipts()
    accounts.open(1, intent, now=0)
    intent.begin(3)
    intent.end(2)
    intent.begin(5)
    newest: dict[int, int] = {}
    receipts.begin(now=10, most=4)
    receipts.end([(1, 0, 2), (1, 3, 1), (1, 2, 1), (9, 0, 1)], now=20)
    receipts.begin(now=30, most=7)
    assert receipts.cut_short(killed=40) == CutGet(30, 40, 7)
    assert accounts.read(receipts, newest) == [20] * 4
    assert (accounts.torn, accounts.disordered, accounts.duplicates) == (1, 1, 0)
    assert (accounts.received, accounts.surely_put, accounts.perhaps_put) == (4, 4, 5)
    assert (accounts.gaps(), accounts.beyond()) == ([], 0)
    receipts.end([(1, 5, 1)], now=50)
    assert receipts.cut_short(killed=60) is None
    accounts.read(receipts, newest)
    intent.settle()
    assert [(gap.first, gap.count) for gap in accounts.gaps()] == [(4, 1)]
    assert accounts.beyond() == 1
    receipts.close()


def test_a_consumer_far_ahead_waits_for_the_reader(monkeypatch):
    monkeypatch.setattr(accounts, "_NAPS_MOST", 60_000)
    receipts, book = Receipts(), Accounts()
    writer = threading.Thread(target=receipts.end, args=([(9, 0, 1)] * 8193, 20))
    writer.start()
    writer.join(0.05)
    assert writer.is_alive(), "it did not wait"
    seen = len(book.read(receipts, {}))
    writer.join(60)
    assert not writer.is_alive()
    assert seen + len(book.read(receipts, {})) == 8193
    receipts.close()


# ---- the flow -------------------------------------------------------------------------------


def flow_of(*milliseconds: int) -> Flow:
    flow = Flow()
    flow.arrived([each * MILLISECOND for each in milliseconds])
    return flow


def test_the_longest_pause_is_found_whatever_the_order():
    flow = flow_of(500, 100, 107, 130)
    flow.finish(600 * MILLISECOND)
    assert flow.longest == flow.longest_whole == 370 * MILLISECOND
    assert "5+: 1, 10+: 0, 20+: 1, 50+: 0, 100+: 1, 200+: 1" in flow.histogram()


def test_a_pause_does_not_count_while_a_process_is_stopped():
    flow = flow_of(100, 500)
    flow.stopped(200 * MILLISECOND, 450 * MILLISECOND)
    flow.stopped(150 * MILLISECOND, 220 * MILLISECOND)
    flow.look(10_000 * MILLISECOND)
    assert flow.longest == 50 * MILLISECOND
    assert flow.longest_whole == 400 * MILLISECOND
    flow.arrived([700 * MILLISECOND])
    flow.look(10_000 * MILLISECOND)
    assert flow.longest == 200 * MILLISECOND


def test_a_pause_that_goes_on_counts_at_the_end():
    flow = flow_of(100)
    flow.finish(3100 * MILLISECOND)
    assert flow.longest == 3000 * MILLISECOND
