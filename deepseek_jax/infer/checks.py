"""Refuses what an engine can't answer, or can't be made of: one clear line."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from deepseek_jax.errors import InputError
from deepseek_jax.infer import sampler
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.infer.programs import STOPS
from deepseek_jax.infer.request import Request
from deepseek_jax.model.transformer import Model


class Bounds(NamedTuple):
  """Holds what an engine can answer at most; fields as in `EngineConfig`."""

  vocab: int
  context: int
  page: int
  pages: int
  queue: int
  has_text: bool  # whether there is a tokenizer
  routes: bool  # whether experts are kept, of a model that has some
  kept: bool


def bounds(
  model: Model, cfg: EngineConfig, page: int, pages: int, has_text: bool
) -> Bounds:
  """Returns what an engine of so many pages can answer at most."""
  routed = any(layer.block.routed for layer in model.config.in_order())
  return Bounds(
    model.config.vocab_size,
    cfg.context,
    page,
    pages,
    cfg.queue,
    has_text,
    cfg.routing and routed,
    cfg.kept,
  )


def check_text(text: Any, model: Model) -> None:
  """Raises InputError for a tokenizer that doesn't fit the model."""
  vocab = model.config.vocab_size
  size = getattr(text, 'vocab_size', 0)
  if size > vocab:
    raise InputError(
      f'tokenizer: has {size} tokens, the model {vocab}; give the tokenizer'
      ' that the model was trained with'
    )


def check_variables(model: Model, variables: dict) -> None:
  """Raises InputError unless variables are a model's, prepared or not."""
  given = _shapes(variables)
  wanted = [_shapes(_pure(made)) for made in (model, build_flat(model))]
  if given in wanted:
    return
  want = wanted[0]
  name = min(set(want.items()) ^ set(given.items()), key=str)[0]
  shown = lambda shapes: list(shapes[name]) if name in shapes else 'missing'
  raise InputError(
    f'variables{name}: {shown(given)}, but {shown(want)} in the model; give'
    ' those of the same configuration'
  )


def _pure(model: Model) -> dict:
  """Returns a model's variables by their shapes alone."""
  return {k: nnx.to_pure_dict(v) for k, v in model.abstract.items()}


def _shapes(variables: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each leaf by its path."""
  leaves = jax.tree.leaves_with_path(variables)
  return {jax.tree_util.keystr(k): jax.numpy.shape(leaf) for k, leaf in leaves}


def check_request(request: Request, most: Bounds) -> None:
  """Raises InputError for a request that can't be answered."""
  length = len(request.prompt)
  biased = tuple(token for token, _ in request.sampling.logit_bias)
  fields = ('prompt', request.prompt), ('logit_bias', biased)
  for name, tokens in (*fields, ('stop', request.sampling.stop)):
    wrong = next((t for t in tokens if not 0 <= t < most.vocab), None)
    if wrong is not None:
      raise InputError(
        f'{name}: token {wrong} is outside the vocabulary of {most.vocab}'
      )
  if length >= most.context:
    raise InputError(
      f'prompt: {length} tokens leave no room for an answer in a context of'
      f' {most.context}; shorten it, or raise engine.context'
    )
  tokens = min(length + request.max_new_tokens, most.context)
  need = -(-tokens // most.page)
  if need > most.pages:
    raise InputError(
      f'prompt: {length} tokens and {request.max_new_tokens} new ones need'
      f' {need} pages of the cache, which has {most.pages};'
      ' shorten them, or raise engine.pages'
    )
  counts = {
    'sampling.stop': (len(request.sampling.stop), STOPS),
    'logit_bias': (len(biased), sampler.BIASES),
    'logprobs': (request.logprobs or 0, sampler.TOP),
    'n': (request.n, most.queue),
  }
  for name, (given, limit) in counts.items():
    if given > limit:
      raise InputError(f'{name}: {given} given, at most {limit} are taken')
  if request.routes and not most.routes:
    raise InputError(
      'routes: the engine keeps no experts: EngineConfig(routing=True), of a'
      ' model that has some'
    )
  if request.kept and not most.kept:
    raise InputError(
      'kept: the engine does not keep what draws could have taken:'
      ' EngineConfig(kept=True)'
    )
  if not most.has_text and (request.stop_strings or request.grammar):
    what = 'stop_strings' if request.stop_strings else 'grammar'
    raise InputError(f'{what}: needs the tokenizer: Engine(..., text=...)')
