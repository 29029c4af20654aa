"""HTTP server of an engine's metrics for Prometheus (needs the extra `metrics`)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING

from dsv3.engine.groups import PageStates
from dsv3.engine.metrics import Histogram, Metrics
from dsv3.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Metric


class MetricsCollector:
    """Collector that passes an engine's current metrics to prometheus-client."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> "Iterator[Metric]":
        """Yield all metrics under names `dsv3_...`."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        for figure in fields(self._metrics):
            value = getattr(self._metrics, figure.name)
            name = f"dsv3_{figure.name}"
            about = figure.metadata["about"]
            if isinstance(value, Histogram):
                buckets = _cumulative(value)
                yield HistogramMetricFamily(name, about, buckets=buckets, sum_value=value.total)
            elif figure.metadata["kind"] == "counters":
                family = CounterMetricFamily(name, about, labels=["place"])
                for place, count in enumerate(value, 1):
                    family.add_metric([str(place)], count)
                yield family
            elif figure.metadata["kind"] == "counter":
                yield CounterMetricFamily(name, about, value=value)
            else:
                yield GaugeMetricFamily(name, about, value=value)


class CacheCollector:
    """Collector of the layout, and of the pages of each data-parallel group's cache.

    Args:
        states: returns the states of each group's pages.
        layout: names and values of the layout.
    """

    def __init__(self, states: Callable[[], list[PageStates]], layout: Mapping[str, str]) -> None:
        self._states = states
        self._layout = layout

    def collect(self) -> "Iterator[Metric]":
        """Yield the metrics."""
        from prometheus_client.core import GaugeMetricFamily

        layout = GaugeMetricFamily("dsv3_layout", "ranks and cache", labels=list(self._layout))
        layout.add_metric(list(self._layout.values()), 1)
        yield layout
        about = "pages by state; each rank of a group holds its share of each page"
        pages = GaugeMetricFamily("dsv3_group_pages", about, labels=["group", "state"])
        for group, states in enumerate(self._states()):
            for state, count in states._asdict().items():
                pages.add_metric([str(group), state], count)
        yield pages


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Return upper bounds and the number of observations up to each of them."""
    bounds = [*(f"{bound:.4g}" for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


def check_exporter(port: int) -> None:
    """Raise ConfigError if prometheus-client is not installed."""
    try:
        import_module("prometheus_client")
    except ImportError as error:
        reason = "prometheus-client is not installed: pip install prometheus-client"
        raise ConfigError(f"--metrics-port={port}: {reason}") from error


@contextmanager
def serve_metrics(metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Serve GET /metrics from a thread for the duration of the context.

    Args:
        metrics: the metrics to serve.
        host: address to listen on; "0.0.0.0" is all interfaces.
        port: port to listen on; 0 selects a free port.

    Yields:
        the port.

    Raises:
        ConfigError: prometheus-client is not installed, or the port is not available.
    """
    check_exporter(port)
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(MetricsCollector(metrics))
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--metrics-port={port} cannot be listened on at {host}: {error}"
        ) from error
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
