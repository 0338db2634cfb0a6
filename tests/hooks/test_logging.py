"""Log records of other processes, by the hooks of loguru and of the standard library."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import shmring
from support import wait_for

LINES = 200


def log_many(logger: Any, label: str, die: bool = False) -> None:
    for number in range(LINES):
        logger.info(f"{label} {number}")
    if die:
        os.kill(os.getpid(), signal.SIGKILL)


def check(text: str, labels: list[str]) -> None:
    """Each label's lines are there, whole and in order."""
    for label in labels:
        assert re.findall(rf"^{label} (\d+)$", text, re.M) == [str(each) for each in range(LINES)]
    assert len(text.splitlines()) == LINES * len(labels)


@pytest.mark.parametrize("die", [False, True])
def test_loguru_enqueues_through_the_context(start_method: str, die: bool, tmp_path: Path) -> None:
    logger = pytest.importorskip("loguru").logger
    if die and shmring.backend != "ring":
        pytest.skip("a killed process blocks a pipe")
    context = shmring.get_context(start_method)
    file = tmp_path / "log"
    logger.remove()
    logger.add(file, enqueue=True, context=context, format="{message}")
    labels = ["first", "second"]
    children = [context.Process(target=log_many, args=(logger, each, die)) for each in labels]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == (-9 if die else 0)
    log_many(logger, "parent")
    logger.complete()
    logger.remove()
    check(file.read_text(), [*labels, "parent"])


def log_by_configuration(queue: Any, label: str, die: bool) -> None:
    """Configure this process as the documents of ``logging`` do, and log."""
    plain = sys.version_info < (3, 12)  # later versions take only their own queues, or a factory
    handler = {
        "class": "logging.handlers.QueueHandler",
        "queue": queue if plain else {"()": lambda: queue},
        **({} if plain else {"handlers": []}),  # 3.12.1 wants these named
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "handlers": {"queue": handler},
            "loggers": {"hooks": {"handlers": ["queue"], "level": "INFO"}},
        }
    )
    log_many(logging.getLogger("hooks"), label, die)


@pytest.mark.parametrize("die", [False, True])
def test_a_queue_handler_from_a_configuration_sends_to_the_listener(
    start_method: str, die: bool, tmp_path: Path
) -> None:
    if die and shmring.backend != "ring":
        pytest.skip("a killed process blocks a pipe")
    context = shmring.get_context(start_method)
    file = tmp_path / "log"
    with context.Queue() as queue:
        handler = logging.FileHandler(file)
        listener = logging.handlers.QueueListener(queue, handler)
        listener.start()
        labels = ["first", "second"]
        children = [
            context.Process(target=log_by_configuration, args=(queue, each, die)) for each in labels
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == (-9 if die else 0)
        wait_for(queue.empty, 30)
        listener.stop()
        handler.close()
    check(file.read_text(), labels)
