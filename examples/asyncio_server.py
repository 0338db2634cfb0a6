"""An asyncio server that hands heavy work to a pool, and tells its clients what goes on.

    client ──line──> server (asyncio) ──submit──> pool of processes
      ^                                               |
      +──answer── future                 progress ── Queue, read by `async for`

    python asyncio_server.py [PORT]     then, for example: echo 1000003 | nc localhost PORT

Without a port it serves three clients of its own and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

import shmring

_progress: shmring.Queue[tuple[int, int]]


def begin(progress: shmring.Queue[tuple[int, int]]) -> None:
    """Runs first in each worker."""
    global _progress
    _progress = progress


def smallest_factor(number: int) -> int:
    """Heavy work, in a worker."""
    _progress.put((os.getpid(), number))
    divisor = 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            return divisor
        divisor += 1
    return number


async def report(progress: shmring.Queue[tuple[int, int]]) -> None:
    """Print what the workers tell until the queue is shut down; no thread polls."""
    async for pid, number in progress:
        print(f"worker {pid} factors {number}")


async def serve(pool: shmring.ProcessPoolExecutor, port: int) -> asyncio.Server:
    loop = asyncio.get_running_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            number = int(await reader.readline())
            factor = await loop.run_in_executor(pool, smallest_factor, number)
            writer.write(f"{factor}\n".encode())
        except ValueError:
            writer.write(b"a number is needed\n")
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", port)


async def ask(port: int, text: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{text}\n".encode())
    answer = await reader.readline()
    writer.close()
    return answer.decode().strip()


async def main(port: int | None) -> None:
    with shmring.Queue() as progress:
        reporter = asyncio.create_task(report(progress))
        with shmring.ProcessPoolExecutor(2, initializer=begin, initargs=(progress,)) as pool:
            server = await serve(pool, port or 0)
            async with server:
                if port is not None:
                    print(f"listening on port {port}; Ctrl-C ends it")
                    await server.serve_forever()
                chosen = server.sockets[0].getsockname()[1]
                questions = ["1000003", "999999", "many"]
                answers = await asyncio.gather(*(ask(chosen, text) for text in questions))
        progress.shutdown()
        await reporter
        print(dict(zip(questions, answers, strict=True)))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else None))
