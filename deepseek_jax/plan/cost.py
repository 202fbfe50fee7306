"""Computes time and money, each with a line that papers use.

Tokens, seconds, devices and dollars are arguments, as whoever measured them
gives them.
"""

from collections.abc import Mapping

HOUR, DAY = 3600.0, 86400.0


def tokens_per_day(step_tokens: float, step_seconds: float) -> float:
  """Returns the tokens of a day at a measured step time."""
  return step_tokens / step_seconds * DAY


def device_hours(tokens: float, devices: int, tokens_a_day: float) -> float:
  """Returns the hours of all devices together.

  Args:
    tokens: to train on.
    devices: how many.
    tokens_a_day: measured rate of all devices together.
  """
  return tokens / tokens_a_day * devices * DAY / HOUR


def achieved(
  flops_per_token: float,
  step_tokens: float,
  step_seconds: float,
  devices: int,
) -> float:
  """Returns the FLOP/s of one device."""
  return flops_per_token * step_tokens / step_seconds / devices


def planned_hours(
  tokens: float, flops_per_token: float, peak: float, utilization: float
) -> float:
  """Returns device-hours at a share `utilization` of the peak FLOP/s."""
  return tokens * flops_per_token / (peak * utilization) / HOUR


def bill(hours: Mapping[str, float], price: float) -> tuple[float, float]:
  """Returns (device-hours, dollars at `price` per hour) of all phases."""
  total = sum(hours.values())
  return total, total * price


def saved(now: float, before: float) -> float:
  """Returns the share by which `now` is below `before`."""
  return 1 - now / before


def speculative_bound(acceptance: float) -> float:
  """Returns the most tokens per step when one token is drafted.

  Args:
    acceptance: share of drafted tokens that are kept, 0 to 1.
  """
  return 1 + acceptance
