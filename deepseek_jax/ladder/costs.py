"""Takes from the planner what each rung costs: FLOPs, cache, memory."""

import math
from typing import NamedTuple

import jax
from flax import nnx

from deepseek_jax.ladder.rungs import RUNGS, shaped
from deepseek_jax.ladder.sizes import published
from deepseek_jax.model.transformer import build
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.plan.device_shares import Mesh
from deepseek_jax.plan.flops import count_flops, decode_flops
from deepseek_jax.plan.memory import Training, cache, device_bytes
from deepseek_jax.plan.parameters import count_parameters
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train import muon

LONG = 131072  # tokens of context at which a published shape decodes
PUBLISHED_WINDOW = 4096  # tokens of a window that it is trained on


class RungCost(NamedTuple):
  """Holds what a model costs by the plan.

  Attributes:
    parameters, active: of the model, multi-token prediction apart.
    training: FLOPs per token, multi-token prediction included.
    decode: FLOPs of a token behind `context` tokens, in the cheaper form.
    cache: bytes of the cache of `context` tokens, bfloat16.
    context: tokens.
  """

  parameters: int
  active: int
  training: float
  decode: int
  cache: int
  context: int


def cost(model: TransformerConfig, window: int, context: int) -> RungCost:
  """Returns the cost of a model.

  Args:
    model: which.
    window: tokens of a training window.
    context: tokens that decoding has behind it.
  """
  count = count_parameters(model)
  return RungCost(
    count.total,
    count.active,
    count_flops(model, window, mtp=True).per_token,
    min(decode_flops(model, context).values()),
    cache(model, context).bf16,
    context,
  )


def training_bytes(run: RunConfig) -> int:
  """Returns the bytes of a run's training step on one device."""
  training = Training(
    seq_len=run.data.seq_len,
    micro_batch=run.train.batch.size,
    optimizer=run.train.optimizer,
  )
  (classes,) = device_bytes(run.model, Mesh(), training)
  return sum(classes.values())


def update_flops(run: RunConfig) -> int:
  """Returns the FLOPs of Muon's iterations in one step; 0 under AdamW.

  No budget has them: they do not grow with the tokens of a step, of which
  small runs have few. A round takes three products of an n x m matrix, n <= m:
  4 n^2 m + 2 n^3.
  """
  cfg = run.train.optimizer.muon
  if cfg is None:
    return 0
  total = 0
  leaf = lambda v: isinstance(v, nnx.Variable)
  for variable in jax.tree.leaves(
    build(run.model).abstract['params'], is_leaf=leaf
  ):
    how = muon.split(tuple(variable.get_metadata()['axes']))
    if how is None:
      continue
    shape = jax.tree.leaves(variable)[0].shape
    stack = len(shape) - sum(map(len, how))
    n, m = sorted(
      math.prod(shape[stack + i] for i in group)
      for group in (how.inputs, how.outputs)
    )
    one = len(cfg.coefficients()) * (4 * n * n * m + 2 * n**3)
    total += math.prod(shape) // (n * m) * one
  return total


def published_costs() -> dict[str, RungCost]:
  """Returns the cost of every rung at V3's and V4's published widths."""
  shape = published()
  return {
    rung.name: cost(shaped(shape, rung.name), PUBLISHED_WINDOW, LONG)
    for rung in RUNGS
  }
