"""Counts what a server does, for Prometheus to read at /metrics."""

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST


class Meters:
  """Holds the numbers of one server, apart from those of others."""

  def __init__(self):
    """Starts all at 0."""
    self._registry = prometheus.CollectorRegistry()
    self._engine: dict[str, float] = {}
    named = lambda kind, name, text, **more: kind(
      f'deepseek_jax_{name}', text, registry=self._registry, **more
    )
    self._answers = named(
      prometheus.Counter,
      'http_requests_total',
      'Requests by route and status.',
      labelnames=('route', 'status'),
    )
    self._under_way = named(
      prometheus.Gauge, 'requests_under_way', 'Requests that are answered now.'
    )
    self._new = named(
      prometheus.Counter, 'completion_tokens_total', 'Tokens of answers.'
    )
    self._prompt = named(
      prometheus.Counter, 'prompt_tokens_total', 'Tokens of prompts.'
    )
    self._cached = named(
      prometheus.Counter,
      'prompt_cached_tokens_total',
      'Tokens of prompts whose pages were reused.',
    )
    self._first = named(
      prometheus.Histogram,
      'first_token_seconds',
      'From a request to its first token.',
      buckets=_SECONDS,
    )
    self._gap = named(
      prometheus.Histogram,
      'token_gap_seconds',
      'Between the tokens of an answer.',
      buckets=_SECONDS,
    )
    self._registry.register(self)

  def collect(self) -> list[GaugeMetricFamily]:
    """Returns the engine's numbers; prometheus_client calls it."""
    return [
      GaugeMetricFamily(
        f'deepseek_jax_engine_{name}', f'Engine: {name}.', value=value
      )
      for name, value in sorted(self._engine.items())
    ]

  def engine_stats(self, stats: dict[str, float]) -> None:
    """Takes the engine's numbers after a step; from the engine's thread."""
    self._engine = stats

  def answered(self, route: str, status: int) -> None:
    """Counts a response."""
    self._answers.labels(route, str(status)).inc()

  def opened(self, under_way: int) -> None:
    """Tells how many requests are under way."""
    self._under_way.set(under_way)

  def closed(self, under_way: int) -> None:
    """Tells how many requests are left under way."""
    self._under_way.set(under_way)

  def tokens(self, number: int, seconds: float, *, first: bool) -> None:
    """Counts new tokens of a request.

    Args:
      number: of them.
      seconds: since the last ones, or since the request came.
      first: whether they are its first.
    """
    self._new.inc(number)
    (self._first if first else self._gap).observe(seconds)

  def prompts(self, tokens: int, cached: int) -> None:
    """Counts the tokens of a request's prompts, and those reused."""
    self._prompt.inc(tokens)
    self._cached.inc(cached)

  def text(self) -> bytes:
    """Returns all numbers in Prometheus' format."""
    return prometheus.generate_latest(self._registry)
