"""Drafts tokens with the blocks of multi-token prediction, over a cache.

Training runs a depth over whole batches (mtp.py). To draft, the same blocks run
on a few tokens that follow cached ones: position i takes the state of position
i and the token `depth` places on. What they draft is checked by the model
itself (infer/speculation.py).
Legend: B batch, T tokens, D model, n streams, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import given as inputs
from deepseek_jax.model import kernels
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.context import context


class Draft(NamedTuple):
  """Holds what a block of multi-token prediction predicts.

  Attributes:
    logits: [B T V] float32, of the token after the one that was given.
    state: [B T D] or [B T n D], what the next depth takes of each place.
    cache: the cache of these blocks with these tokens.
  """

  logits: jax.Array
  state: jax.Array
  cache: Cache


class Functions(NamedTuple):
  """Holds the functions that a Model drafts with, see `functions`."""

  init_mtp_cache: Callable[..., Cache]
  draft: Callable[..., Draft]


def functions(
  config: Any,
  merge: Callable[[dict], nnx.Module],
  empty: Callable[..., Cache],
) -> Functions:
  """Makes the functions of a model; without blocks to draft with they raise.

  init_mtp_cache(batch, slots, spare=0) -> Cache makes an empty cache of the
  blocks, with a segment for each depth.

  draft(variables, state, tokens, cache, positions, valid=None, *, depth=1) ->
  Draft runs the block of a depth, with
    state: [B T D] or [B T n D], `aux['mtp_state']` of an Output for depth 1,
      and for others the state that the depth before has drafted.
    tokens: [B T] int32, the token `depth` places on from each.
    cache: from `init_mtp_cache` or an earlier Draft.
    positions: [B T] int32 of the states, not of the tokens ahead.
    valid: [B T] bool, False on padding, which comes last.
    depth: more than there are repeat the last block. Each repetition goes on
      one position: it takes the drafted state for that of the next token.

  Args:
    config: a TransformerConfig.
    merge: variables -> the module, ready to be computed with.
    empty: (config, batch, slots, spare) -> an empty cache of all layers.
  """

  def init_mtp_cache(batch: int, slots: int, spare: int = 0) -> Cache:
    inputs.check_depth(config)
    depths = dataclasses.replace(
      config,
      layout=(((config.mtp.block,), 1),) * config.mtp.depth,
      engram=None,
    )
    # It is read from the first call on: one program serves all calls.
    return dataclasses.replace(empty(depths, batch, slots, spare), fresh=False)

  def draft(
    variables: dict,
    state: jax.Array,
    tokens: jax.Array,
    cache: Cache,
    positions: jax.Array,
    valid: jax.Array | None = None,
    *,
    depth: int = 1,
  ) -> Draft:
    segments = None if valid is None else jnp.asarray(valid, jnp.int32)
    given = inputs.Given(tokens, positions, segments)
    inputs.check_draft(config, given, cache, state, depth)
    ctx = context(
      tokens,
      segments,
      config.vocab_size,
      positions=positions,
      cached=True,
      fresh=cache.fresh,
    )
    with kernels.using(config.compute.kernels, config.compute.products):
      return merge(variables).draft(state, ctx, cache, depth)

  return Functions(init_mtp_cache, draft)
