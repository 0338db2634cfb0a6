"""Metrics of rings, queues, pools and workers, for Prometheus and OpenTelemetry.

::

    observer --look--> facts --METRICS--> samples --+--> prometheus_client
                                                    +--> OpenTelemetry instruments

The observer joins nothing, so one process can export what all processes of its
user do.  It looks at most ten times a second, however many ask.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from shmring._backend import backend
from shmring.errors import NotSupportedByFallback

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from prometheus_client import CollectorRegistry

    from shmring.observer.observer import Observer

__all__ = ["METRICS", "Metric", "Sample", "observe_with", "register", "samples", "serve"]

_KEPT_S = 0.1
_SCAN_S = 1.0


class Metric(NamedTuple):
    """What one metric is.

    Attributes:
        name: without the suffix that Prometheus gives counters.
        kind: "counter" or "gauge".
        text: what it says.
        unit: as OpenTelemetry spells it.
        of: "ring" (queues included), "pool" or "process" (of a registry or a pool).
        value: what it is in the facts of an observer: a key, or a function of them.
    """

    name: str
    kind: str
    text: str
    unit: str
    of: str
    value: str | Callable[[dict[str, Any]], float]


class Sample(NamedTuple):
    """One value of one metric."""

    metric: Metric
    labels: dict[str, str]
    value: float


def _longest_wait(block: dict[str, Any]) -> float:
    return max((each["seconds"] for each in block["waiters"]), default=0.0)


def _is_dead(process: dict[str, Any]) -> bool:
    return process["state"] in ("dead", "exited")


def _is_busy(process: dict[str, Any]) -> bool:
    return process["task"] is not None and not _is_dead(process)


def _living_workers(pool: dict[str, Any]) -> int:
    return sum(not _is_dead(each) for each in pool["processes"])


METRICS: tuple[Metric, ...] = tuple(
    Metric(f"shmring_{of}_{name}", kind, text, unit, of, value)
    for of, name, kind, unit, text, value in (
        ("ring", "messages_put", "counter", "1", "Messages put.", "messages_put"),
        ("ring", "messages_taken", "counter", "1", "Messages taken.", "messages_taken"),
        ("ring", "bytes_put", "counter", "By", "Bytes of frames put.", "bytes_put"),
        ("ring", "growths", "counter", "1", "Growths and shrinkings.", "growths"),
        ("ring", "recoveries", "counter", "1", "Lock owners found dead.", "recoveries"),
        ("ring", "messages", "gauge", "1", "Messages in it now.", "messages"),
        ("ring", "used_bytes", "gauge", "By", "Bytes of frames in it.", "used_bytes"),
        ("ring", "max_bytes", "gauge", "By", "Bytes to which it may grow.", "max_capacity"),
        ("ring", "memory_bytes", "gauge", "By", "Shared memory that it takes.", "nbytes"),
        ("ring", "blocks", "gauge", "1", "Blocks for large buffers.", "blocks"),
        ("ring", "block_bytes", "gauge", "By", "Bytes of these blocks.", "block_bytes"),
        ("ring", "lent_bytes", "gauge", "By", "Bytes of blocks in use.", "lent_bytes"),
        ("ring", "processes", "gauge", "1", "Processes that have it open.", "pids"),
        ("ring", "waiters", "gauge", "1", "Threads asleep in a call.", "waiters"),
        ("ring", "longest_wait_seconds", "gauge", "s", "Longest of the waits.", _longest_wait),
        ("ring", "poisoned", "gauge", "1", "1: every call is refused.", "poisoned"),
        ("pool", "submitted", "counter", "1", "Tasks taken in.", "tasks.submitted"),
        ("pool", "answered", "counter", "1", "Tasks answered.", "tasks.answered"),
        ("pool", "retried", "counter", "1", "Tasks put back.", "tasks.retried"),
        ("pool", "died", "counter", "1", "Workers that died.", "died"),
        ("pool", "running", "gauge", "1", "Tasks at a worker.", "tasks.running"),
        ("pool", "workers", "gauge", "1", "Living workers.", _living_workers),
        ("process", "tasks", "counter", "1", "Tasks answered by it.", "tasks"),
        ("process", "dead", "gauge", "1", "1: it has ended.", _is_dead),
        ("process", "busy", "gauge", "1", "1: it is at a task.", _is_busy),
        ("process", "silent_seconds", "gauge", "s", "Age of its heartbeat.", "silent_seconds"),
    )
)


def _value_of(metric: Metric, facts: Any) -> float:
    """The value in facts; of a list its length."""
    if not isinstance(metric.value, str):
        return float(metric.value(facts))
    for key in metric.value.split("."):
        facts = facts[key]
    return float(len(facts) if isinstance(facts, list) else facts)


_lock = threading.Lock()
_kept: tuple[float, list[Sample]] = (0.0, [])  # until when, and what


@functools.cache
def _observer() -> Observer:
    from shmring.observer.observer import Observer  # not on the fallback

    return Observer(scan_s=_SCAN_S)


def samples() -> list[Sample]:
    """The values of all metrics now, or a tenth of a second ago.

    Returns:
        One for each metric and each ring, queue, pool or process that it is of.

    Raises:
        NotSupportedByFallback: this is the fallback.
        AccessRefused: /dev/shm cannot be read, or /proc is not mounted.
    """
    global _kept
    _check_backend()
    with _lock:
        if time.monotonic() >= _kept[0]:
            found = list(_samples_of(_observer().look(detail=False)))
            _kept = time.monotonic() + _KEPT_S, found
        return _kept[1]


def _check_backend() -> None:
    if backend != "ring":
        raise NotSupportedByFallback("metrics are read from rings, and the fallback has none")


def _samples_of(found: list[dict[str, Any]]) -> Iterator[Sample]:
    for block in found:
        if "error" in block:
            continue
        if "messages" in block:
            yield from _of("ring", block, ring=block["id"], kind=block["kind"])
        if "tasks" in block:
            yield from _of("pool", block, pool=block["id"])
        for each in block.get("processes", ()):
            yield from _of(
                "process",
                each,
                registry=block["id"],
                process=each["process_id"],
                pid=str(each["pid"]),
                role=each["role"],
            )


def _of(what: str, facts: dict[str, Any], **labels: str) -> Iterator[Sample]:
    for metric in METRICS:
        if metric.of == what:
            yield Sample(metric, labels, _value_of(metric, facts))


# -- Prometheus -------------------------------------------------------------------------------


class _Collector:
    """What a Prometheus registry asks at each scrape."""

    def describe(self) -> list[Any]:
        # Without it the registry collects at once, and rings made just after are not looked for.
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for metric, labels, value in samples():
            if metric.name not in families:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[metric.name] = kind(metric.name, metric.text, labels=[*labels])
            families[metric.name].add_metric([*labels.values()], value)
        return iter(families.values())


def register(registry: CollectorRegistry | None = None) -> Any:
    """Export the metrics through prometheus_client.

    Args:
        registry: where to; None is its global registry.

    Returns:
        The collector, for ``registry.unregister``.

    Raises:
        ImportError: prometheus_client is missing.
        NotSupportedByFallback: this is the fallback.
    """
    prometheus = _prometheus()
    _check_backend()  # refuses here rather than at each scrape
    collector = _Collector()
    (prometheus.REGISTRY if registry is None else registry).register(collector)
    return collector


def serve(port: int = 9464, address: str = "127.0.0.1") -> Any:
    """Serve the metrics over HTTP in a thread, with nothing else.

    Args:
        port: where Prometheus scrapes; 0 takes a free one.
        address: of the interface; only this machine by default.

    Returns:
        The server: ``server_port`` is its port, ``shutdown()`` ends it.

    Raises:
        ImportError: prometheus_client is missing.
        NotSupportedByFallback: this is the fallback.
        OSError: the port is taken.
    """
    prometheus = _prometheus()
    registry = prometheus.CollectorRegistry()
    register(registry)
    server, _ = prometheus.start_http_server(port, address, registry)
    return server


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ImportError(
            f'metrics need prometheus_client ({error}): pip install "shmring[metrics]"'
        ) from error
    return prometheus_client


# -- OpenTelemetry ----------------------------------------------------------------------------


def observe_with(meter: Meter) -> None:
    """Export the metrics as observable instruments of OpenTelemetry.

    Args:
        meter: of a provider of the program's own.

    Raises:
        ImportError: opentelemetry is missing.
        NotSupportedByFallback: this is the fallback.
    """
    try:
        from opentelemetry.metrics import Observation
    except ImportError:
        raise ImportError('this needs OpenTelemetry: pip install "shmring[otel]"') from None
    _check_backend()

    def observed(metric: Metric, _: Any) -> list[Any]:
        return [Observation(each.value, each.labels) for each in samples() if each.metric is metric]

    for metric in METRICS:
        create = (
            meter.create_observable_counter
            if metric.kind == "counter"
            else meter.create_observable_gauge
        )
        name = metric.name.replace("_", ".", 2)
        create(name, [functools.partial(observed, metric)], metric.unit, metric.text)
