"""Defines supervised fine-tuning: next-token prediction of chosen tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from deepseek_jax.config import check_choices
from deepseek_jax.errors import InputError
from deepseek_jax.train.objective import (
  Inputs,
  Objective,
  PretrainingConfig,
  next_token,
)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Describes the loss per token that the model must produce.

  The batch's 'trained' [B T+1] is 1 on those tokens. The mean is over the
  tokens of the global batch, not of means over micro-batches.

  Attributes:
    mtp: the prediction blocks are 'trained' on the same tokens, or 'frozen'.
  """

  mtp: Literal['trained', 'frozen'] = 'trained'

  def __post_init__(self) -> None:
    """Raises InputError for an unknown choice."""
    check_choices(self)

  def build(self, model: Any) -> Objective:
    """Returns the objective; it asks nothing of the model."""
    plain = PretrainingConfig().build(model)
    return plain._replace(inputs=answers, mtp=self.mtp == 'trained')


def answers(batch: Mapping[str, jax.Array]) -> Inputs:
  """Returns next-token prediction of the tokens marked in batch['trained'].

  Raises:
    InputError: the batch marks none.
  """
  if 'trained' not in batch:
    raise InputError(
      "batch has no 'trained' [B T+1], 1 on tokens to learn; conversations"
      ' have it, text is for pretraining'
    )
  read = next_token(batch)
  return read._replace(weights=read.weights * batch['trained'][:, 1:])
