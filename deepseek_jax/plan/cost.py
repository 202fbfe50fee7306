"""Arithmetic of time and money, each a line that papers use.

Tokens, seconds, devices and dollars go in as given by whoever measured them.
"""

from collections.abc import Mapping

HOUR, DAY = 3600.0, 86400.0


def tokens_per_day(step_tokens: float, step_seconds: float) -> float:
  return step_tokens / step_seconds * DAY


def device_hours(tokens: float, devices: int, tokens_a_day: float) -> float:
  """Hours of all devices together that `tokens` take at a measured rate."""
  return tokens / tokens_a_day * devices * DAY / HOUR


def achieved(
  flops_per_token: float,
  step_tokens: float,
  step_seconds: float,
  devices: int,
) -> float:
  """FLOP/s of one device."""
  return flops_per_token * step_tokens / step_seconds / devices


def planned_hours(
  tokens: float, flops_per_token: float, peak: float, utilization: float
) -> float:
  """Device-hours at a share `utilization` of the peak FLOP/s."""
  return tokens * flops_per_token / (peak * utilization) / HOUR


def bill(hours: Mapping[str, float], price: float) -> tuple[float, float]:
  """All phases together: (device-hours, dollars at `price` per hour)."""
  total = sum(hours.values())
  return total, total * price


def saved(now: float, before: float) -> float:
  """The share by which `now` is below `before`."""
  return 1 - now / before


def speculative_bound(acceptance: float) -> float:
  """Most tokens per step when one drafted token is kept so often."""
  return 1 + acceptance
