"""Reads held-out documents through a pipeline: forward only, stage by stage."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from deepseek_jax.parallel import sharding
from deepseek_jax.pipeline import stage_calls
from deepseek_jax.pipeline.one_pass import Place
from deepseek_jax.pipeline.pipeline import Pipeline
from deepseek_jax.train.evaluate import bits_per_byte_by


class Reader:
  """Evaluates a model on the devices where its stages lie."""

  def __init__(self, pipeline: Pipeline):
    """Prepares a program per stage; the first batch compiles them."""
    self._pipeline = pipeline
    self._programs = [
      jax.jit(functools.partial(stage_calls.read, stage))
      for stage in pipeline.stages
    ]

  def bits_per_byte(self, held: Sequence[dict], heldout: Any) -> float:
    """Returns the bits per byte of held-out text, see `evaluate.bits_per_byte`.

    Args:
      held: variables by stage, of `pipeline.split`.
      heldout: a data.Heldout.
    """
    pipeline = self._pipeline
    places = [Place(i, i) for i in range(len(pipeline.stages))]
    variables = pipeline.copied(held, places)

    def nll(batch: dict) -> Any:
      stream = None
      for place, program in zip(places, self._programs):
        if stream is not None:
          stream = pipeline.put(stream, place.rank, 'batch', 'seq')
        with sharding.under(pipeline.using[place.rank]):
          stream = program(variables[place], stream, batch)
      return stream

    return bits_per_byte_by(nll, heldout)
