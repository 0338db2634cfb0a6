"""Metrics: scraped over HTTP, observed by OpenTelemetry, drawn by the example dashboard."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmring import ProcessPoolExecutor, Queue, metrics
from support import own_name, run_in_process, wait_for

pytest.importorskip("shmring._core.handle")
prometheus_client: Any = pytest.importorskip("prometheus_client")

ROOT = Path(__file__).resolve().parents[2]
NAME = own_name("metrics")


@pytest.fixture
def url() -> Iterator[str]:
    server = metrics.serve(0)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def scrape(url: str, name: str, **labels: str) -> list[float]:
    """The values of a metric that has these labels."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    return [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(f"{name}{{")
        if all(f'{label}="{value}"' in line for label, value in labels.items())
    ]


def test_a_queue_is_scraped_over_http(url: str) -> None:
    def value(name: str) -> list[float]:
        return scrape(url, f"shmring_ring_{name}", ring=NAME, kind="queue")

    with Queue[int](name=NAME) as queue, run_in_process(queue.get) as waiter:
        wait_for(lambda: value("waiters") == [1], 30)
        queue.put_many([1, 2, 3])
        waiter.join(30)
        wait_for(lambda: value("messages_taken_total") == [1], 30)
        assert value("messages_put_total") == [3]
        assert value("messages") == [2]
        assert value("poisoned") == [0]
        (nbytes,) = value("memory_bytes")
        assert nbytes > 1 << 16
    wait_for(lambda: value("messages") == [], 30)


def test_a_pool_and_its_workers_are_scraped(url: str) -> None:
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(abs, range(-10, 0), chunksize=1)) == [*range(10, 0, -1)]
        own = f"pool-{os.getpid()}-{pool._manager._tasks._identity()[1]:016x}"
        wait_for(lambda: scrape(url, "shmring_pool_answered_total", pool=own) == [10], 30)
        assert scrape(url, "shmring_pool_workers", pool=own) == [2]
        assert sum(scrape(url, "shmring_process_tasks_total", registry=own)) == 10
        for number in range(2):
            worker = f"shmring-worker-{number}"
            assert scrape(url, "shmring_process_dead", registry=own, process=worker) == [0]


def test_a_registry_of_the_programs_own() -> None:
    registry = prometheus_client.CollectorRegistry()
    collector = metrics.register(registry)
    with Queue[int](name=NAME) as queue:
        queue.put(1)
        labels = {"ring": NAME, "kind": "queue"}
        wait_for(lambda: registry.get_sample_value("shmring_ring_messages", labels) == 1, 30)
    registry.unregister(collector)
    assert b"shmring" not in prometheus_client.generate_latest(registry)


def test_opentelemetry_observes_the_same() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider(metric_readers=[reader])
    metrics.observe_with(provider.get_meter("test"))
    with Queue[int](name=NAME) as queue:
        queue.put_many([1, 2])

        def observed() -> dict[str, Any]:
            (resource,) = reader.get_metrics_data().resource_metrics
            (scope,) = resource.scope_metrics
            return {
                metric.name: point.value
                for metric in scope.metrics
                for point in metric.data.data_points
                if point.attributes.get("ring") == NAME
            }

        wait_for(lambda: observed().get("shmring.ring.messages_put") == 2, 30)
        assert observed()["shmring.ring.messages"] == 2
    provider.shutdown()


def test_the_dashboard_draws_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    assert len(expressions) > 5
    exported = {
        metric.name + ("_total" if metric.kind == "counter" else "") for metric in metrics.METRICS
    }
    drawn = {name for each in expressions for name in re.findall(r"shmring_\w+", each)}
    assert drawn <= exported
    assert len(drawn) > 10


@pytest.mark.parametrize(
    ("missing", "call", "extra"),
    [
        ("prometheus_client", "serve(0)", "shmring[metrics]"),
        ("opentelemetry.metrics", "observe_with(None)", "shmring[otel]"),
    ],
)
def test_a_missing_extra_is_named(missing: str, call: str, extra: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from shmring import metrics\n"
        f"try: metrics.{call}\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert f'pip install "{extra}"' in done.stdout


def test_the_fallback_has_no_metrics() -> None:
    program = (
        "import shmring, shmring.metrics\n"
        "try: shmring.metrics.register()\n"
        "except shmring.NotSupportedByFallback as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "SHMRING_BACKEND": "queue"},
    )
    assert "the fallback has none" in done.stdout
