"""What is counted for Prometheus."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..queue.desk import Desk
from ..queue.messages import Report, Turn
from ..queue.tickets import Ticket

WINDOW_S = 60.0
"""Steps per second are those of so many last seconds."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counts what the engine does, in a registry of its own.

    Args:
        engine: whose turns and ended requests are counted.
    """

    def __init__(self, engine: Desk):
        self.registry = registry = CollectorRegistry()
        self._steps_of: dict[str, int] = {}
        self._lately: collections.deque[tuple[float, int]] = collections.deque()
        self._batch = Histogram(
            "xdit_batch_size", "Calls of the denoiser answered together.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64), registry=registry,
        )  # fmt: skip
        self._steps = Counter("xdit_steps", "Steps that all requests made together.", registry=registry)
        self._phases = Counter(
            "xdit_phase_seconds", "Seconds of the first rank of every gang by phase, and of the front (encode).",
            ["phase"], registry=registry,
        )  # fmt: skip
        self._started = Histogram(
            "xdit_time_to_start_seconds",
            "Seconds from a request's arrival to its start.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._ended = Histogram(
            "xdit_request_seconds", "Seconds from a request's arrival to its end, by outcome.", ["outcome"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._failed = Counter(
            "xdit_failures", "Requests that ended without a picture, by kind.", ["kind"], registry=registry
        )
        self._answered = Counter(
            "xdit_http_responses", "Answers by route and status.", ["route", "status"], registry=registry
        )
        registry.register(_State(engine, self))
        engine.turned.append(self.turned)
        engine.ended.append(self.ended)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    def spent(self, phase: str, seconds: float) -> None:
        """Count seconds that the front itself spent."""
        self._phases.labels(phase).inc(seconds)

    def answered(self, route: str, status: int) -> None:
        """Count an answer.

        Args:
            route: the path as it is declared, so that there are few of them.
        """
        self._answered.labels(route, str(status)).inc()

    def turned(self, turn: Turn, report: Report) -> None:
        """Count a turn of the ranks."""
        if turn.run:
            self._batch.observe(len(turn.run))
        for phase, seconds in report.seconds.items():
            self.spent(phase, max(0.0, seconds))
        steps = 0
        for id, told in report.told.items():
            steps += max(0, told.step - self._steps_of.get(id, 0))
            self._steps_of[id] = told.step
        if steps:
            self._steps.inc(steps)
            self._lately.append((time.monotonic(), steps))
            self.steps_per_second()

    def ended(self, ticket: Ticket) -> None:
        """Count a request that ended."""
        self._steps_of.pop(ticket.id, None)
        event, now = ticket.last, ticket.ended or time.monotonic()
        if event is None:
            return
        if ticket.started is not None:
            self._started.observe(max(0.0, ticket.started - ticket.arrived))
        self._ended.labels(event.kind).observe(now - ticket.arrived)
        if event.kind != "done":
            kind = ("input" if event.is_input else "internal") if event.kind == "failed" else event.kind
            self._failed.labels(kind).inc()

    def steps_per_second(self) -> float:
        """Of the last minute."""
        now = time.monotonic()
        while self._lately and self._lately[0][0] < now - WINDOW_S:
            self._lately.popleft()
        return sum(steps for _, steps in self._lately) / WINDOW_S


_GAUGES = {
    "xdit_queue": "Requests that wait.",
    "xdit_running": "Requests at work.",
    "xdit_ready": "Whether the ranks take requests.",
    "xdit_steps_per_second": "Steps that all requests made together, over the last minute.",
}
_COUNTERS = {
    "xdit_restarts": "How often ranks were started anew.",
    "xdit_shifts": "How often ranks were arranged anew for another plan.",
}
_OF_RANKS: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str]] = {
    "resident": (GaugeMetricFamily, "xdit_rank_resident_bytes", "Memory of a rank's process."),
    "device_memory": (GaugeMetricFamily, "xdit_rank_device_bytes", "Memory of a rank on its accelerator."),
    "sent": (
        CounterMetricFamily, "xdit_collective_bytes",
        "Bytes that a rank sent to others in calls of the denoiser, counted in its graphs.",
    ),
}  # fmt: skip


class _State:
    """What is read from the engine when Prometheus asks."""

    def __init__(self, engine: Desk, metrics: Metrics):
        self._engine, self._metrics = engine, metrics

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        status = engine.status()
        values = {
            "xdit_queue": status["queued"], "xdit_running": len(status["running"]),
            "xdit_ready": engine.ready and not engine.draining,
            "xdit_steps_per_second": self._metrics.steps_per_second(), "xdit_restarts": status["restarts"],
            "xdit_shifts": status["shifts"],
        }  # fmt: skip
        for name, help in _GAUGES.items():
            yield GaugeMetricFamily(name, help, float(values[name]))
        for name, help in _COUNTERS.items():
            yield CounterMetricFamily(name, help, float(values[name]))
        for key, (kind, name, help) in _OF_RANKS.items():
            by_rank = kind(name, help, labels=["rank"])
            for each in status["ranks"]:
                by_rank.add_metric([str(each["rank"])], each[key])
            yield by_rank
