"""Run by an aarch64 Python under qemu-user: what a program sees where no robust lists are."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import warnings

REASON = "no robust futexes, without which a killed process would block the others"


def child(inbox: object, outbox: object) -> None:
    """Answer until there is nothing more to be asked."""
    for number in iter(inbox.get, None):
        outbox.put(2 * number)


def answer(name: str) -> None:
    """The other end of a HighPerformanceIPC."""
    import shmring

    with shmring.HighPerformanceIPC("answers") as ipc:
        ipc.connect_message_queue(f"to-{name}", timeout=60)
        ipc.connect_message_queue(f"from-{name}", timeout=60)
        asked = ipc.receive_message(f"to-{name}", timeout=60)
        ipc.send_message(f"from-{name}", shmring.MessageType.DATA, {"got": asked.data})


def main() -> None:
    """Say what there is, and use it."""
    assert platform.machine() == "aarch64", platform.machine()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import shmring

        assert shmring.backend == "queue"
    (warning,) = [each for each in said if "fallback" in str(each.message)]
    assert issubclass(warning.category, RuntimeWarning)
    assert REASON in str(warning.message)
    assert os.strerror(38) in str(warning.message)  # ENOSYS
    print(f"said: {warning.message}")

    insisting = subprocess.run(
        [sys.executable, "-c", "from shmring import Queue"],
        env={**os.environ, "SHMRING_BACKEND": "ring"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert insisting.returncode == 1
    assert f"ImportError: this kernel (or emulator) has {REASON}" in insisting.stderr
    os.environ["SHMRING_BACKEND"] = "queue"  # for the children: it has been said

    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        with shmring.Queue(ctx=context) as inbox, shmring.Queue(ctx=context) as outbox:
            process = context.Process(target=child, args=(inbox, outbox))
            process.start()
            inbox.put_many([*range(100), None])
            assert [outbox.get(timeout=60) for _ in range(100)] == list(range(0, 200, 2))
            process.join()
        print(f"a queue to a child and one back ({method}): well")

    name = str(os.getpid())
    with shmring.HighPerformanceIPC("asks") as ipc:
        ipc.create_message_queue(f"to-{name}")
        ipc.create_message_queue(f"from-{name}")
        process = multiprocessing.get_context("spawn").Process(target=answer, args=(name,))
        process.start()
        ipc.send_message(f"to-{name}", shmring.MessageType.DATA, [1, 2, 3])
        answered = ipc.receive_message(f"from-{name}", timeout=60)
        assert answered.sender_id == "answers"
        assert answered.data == {"got": [1, 2, 3]}
        process.join()
        assert process.exitcode == 0
    print("HighPerformanceIPC between processes: well")

    try:
        shmring.Ring.create()
    except shmring.NotSupportedByFallback as error:
        print(f"Ring: {error}")
    else:
        raise AssertionError("the fallback made a Ring")


if __name__ == "__main__":
    main()
