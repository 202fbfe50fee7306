"""Defines the engine's error of a full queue."""

from deepseek_jax.errors import InputError


class EngineBusy(InputError):
  """Reports that the queue is full: the same request may pass later."""
