"""Looks into attention: what a layer reads and returns, and where it looks.

Nothing of it is needed to train or to sample: each layer's softmax is computed
once more, all T * S of it, for texts that are short enough to be looked at.
Legend: B batch, T queries, S keys, H heads, E compressed entries, D model.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import kind_name
from deepseek_jax.errors import InputError, told
from deepseek_jax.model import given
from deepseek_jax.model.attention import compressor
from deepseek_jax.model.attention.compressor import tail_rope
from deepseek_jax.model.attention.dsa import DSA, choose
from deepseek_jax.model.attention.gqa import GQA
from deepseek_jax.model.attention.indexer import (
  IndexQuery,
  best,
  index_scores,
)
from deepseek_jax.model.attention.mla import MLA
from deepseek_jax.model.attention.query_blocks import Visibility
from deepseek_jax.model.attention.rope import rope
from deepseek_jax.model.attention.shared_kv import SharedKV
from deepseek_jax.model.block import AttentionConfig, Block
from deepseek_jax.model.context import Context, context
from deepseek_jax.model.functional import functional
from deepseek_jax.model.network import Transformer
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel.masking import MASKED

# Names of configurations.
_KINDS = ('mla', 'gqa', 'dsa', 'sharedkv')


class AttentionLayer(NamedTuple):
  """Holds what one layer's attention has to do with some tokens.

  Attributes:
    number: of the layer, from 0.
    config: of its attention.
    params: its weights by name, not stacked.
    x: [B T D], what it reads: the normed stream.
    y: [B T D], what it returns.
  """

  number: int
  config: AttentionConfig
  params: dict
  x: jax.Array
  y: jax.Array


class AttentionMap(NamedTuple):
  """Holds where one layer's attention looks.

  The softmax of each head is over all that a query may see, also where the
  layer reads the chosen alone: what the indexer has to find. `tokens`,
  `entries` and `sinks` add up to 1.

  Attributes:
    number: of the layer, from 0.
    kind: of its attention, as 'mla'; 'csa', 'hca' or 'window' in V4.
    tokens: [B H T T] float32, attention to each token.
    entries: [B H T E] float32, to each compressed entry; None without any.
    sinks: [B H T] float32, what goes nowhere; None without sinks.
    index: [B T S] float32, the indexer's softmax over the tokens, or over the
      entries where there are some; None without an indexer.
    chosen: [B T S] bool, what it picks of them.
    ratio: tokens of an entry, 1 without any.
  """

  number: int
  kind: str
  tokens: jax.Array
  entries: jax.Array | None = None
  sinks: jax.Array | None = None
  index: jax.Array | None = None
  chosen: jax.Array | None = None
  ratio: int = 1

  def target(self) -> jax.Array | None:
    """Returns what the indexer is to imitate [B T S], None without one.

    The heads' attention to what it chooses from, added up and made to sum to
    1; 0 where there is nothing to choose from.
    """
    if self.index is None:
      return None
    seen = self.tokens if self.entries is None else self.entries
    total = seen.sum(axis=1)
    mass = total.sum(axis=-1, keepdims=True)
    return jnp.where(mass > 0, total / jnp.where(mass > 0, mass, 1), 0)

  def recall(self) -> jax.Array | None:
    """Returns the share of the target that is chosen [B T]."""
    if self.index is None:
      return None
    return jnp.where(self.chosen, self.target(), 0).sum(axis=-1)


class _Look(NamedTuple):
  """Holds what `AttentionMap` does, without what is no array."""

  tokens: jax.Array
  entries: jax.Array | None = None
  sinks: jax.Array | None = None
  index: jax.Array | None = None
  chosen: jax.Array | None = None


def attention_layers(
  model: Model, variables: dict, tokens: jax.Array
) -> list[AttentionLayer]:
  """Returns what the attention of every layer reads and returns, in order.

  Args:
    model, variables: the model.
    tokens: [B T], each row one document.

  Raises:
    InputError: tokens or variables are not of this model.
  """
  out = []
  _check(model, tokens)
  arrays = _visited(model, _inputs)(variables, jnp.asarray(tokens))
  for layer, (x, y, params) in zip(model.config.in_order(), arrays):
    own = AttentionLayer(layer.number, layer.block.attention, params, x, y)
    out.append(own)
  return out


def attention_maps(
  model: Model, variables: dict, tokens: jax.Array
) -> list[AttentionMap]:
  """Returns where the attention of every layer looks, in order.

  Args:
    model, variables: the model; its layers are of MLA, GQA, DSA, or V4's.
    tokens: [B T], each row one document.

  Raises:
    InputError: a layer's attention is of another kind, or tokens or variables
      are not of this model.
  """
  _check(model, tokens)
  layers = model.config.in_order()
  for layer in layers:
    _known(layer.number, layer.block.attention)
  looks = _visited(model, _look)(variables, jnp.asarray(tokens))
  return [
    AttentionMap(layer.number, *_named(layer.block.attention, look))
    for layer, look in zip(layers, looks)
  ]


def _check(model: Any, tokens: Any) -> None:
  """Raises InputError for what is no model, or no tokens of it."""
  if not isinstance(model, Model):
    raise InputError(f'model: is {told(model)}; give what ds.build returned')
  given.check(model.config, given.Given(tokens), None)


def _known(number: int, attention: Any) -> None:
  """Raises InputError for an attention that has no map."""
  kind = kind_name(type(attention))
  if kind not in _KINDS:
    raise InputError(
      f'layer {number}: attention maps of {kind} are not known; those of'
      f' {", ".join(_KINDS)} are'
    )


def _named(attention: Any, look: _Look) -> tuple:
  """Returns kind, arrays and ratio of a map, in the order of AttentionMap."""
  kind, ratio = kind_name(type(attention)), 1
  if kind == 'sharedkv':
    made = attention.compressor()
    kind = 'window' if made is None else attention.compress
    ratio = 1 if made is None else made.ratio
  return kind, *look, ratio


@functools.lru_cache(maxsize=16)
def _visited(model: Model, visit: Callable) -> Callable:
  """Returns (variables, tokens) -> what `visit` gives of every block."""
  config = model.config
  make = lambda key: Transformer(config, rngs=nnx.Rngs(key))
  made = functional(make, jnp.dtype(config.compute.products), config.lora)

  @jax.jit
  def run(variables: dict, tokens: jax.Array) -> list:
    net = made.merge(model.cast(variables))
    ctx = context(tokens, None, config.vocab_size)
    ctx, _ = net.hashed(ctx, None)
    stream, out = net.enter(ctx), []
    for layer in config.in_order():
      stack = net.segments[layer.segment][layer.place]
      block = jax.tree.map(lambda a, r=layer.repeat: a[r], stack)
      out.append(visit(block, _read(block, stream, ctx), ctx))
      stream = block(stream, ctx)[0]
    return out

  return run


def _read(block: Block, stream: jax.Array, ctx: Context) -> jax.Array:
  """Returns what a block's attention reads of the stream [B T D]."""
  if block.has_engram:
    stream, _ = block.engram(stream, ctx, None)
  x, _ = block.attention_residual.read(stream)
  return block.attention_norm(x)


def _inputs(block: Block, x: jax.Array, ctx: Context) -> tuple:
  """Returns what an attention reads, what it returns, and its weights."""
  state = nnx.state(block.attention, nnx.Param)
  return x, block.attention(x, ctx)[0], nnx.to_pure_dict(state)


def _look(block: Block, x: jax.Array, ctx: Context) -> _Look:
  """Returns where a block's attention looks."""
  attention = block.attention
  if isinstance(attention, SharedKV):
    return _shared_kv(attention, x, ctx)
  if isinstance(attention, GQA):
    return _Look(_gqa(attention, x, ctx))
  look = _Look(_mla(attention, x, ctx))
  if isinstance(attention, DSA):
    at = ctx.positions
    keys = attention.index_key(x, at)
    seen = jnp.broadcast_to(_causal(x.shape[1]), look.tokens[:, 0].shape)
    query = attention.index_query(x, at)
    top_k, picked = attention.cfg.top_k, None
    if attention.cfg.indexer.blocks and x.shape[1] > top_k:
      picked = choose(attention.cfg, query, keys, Visibility(at))
    index, chosen = _indexed(query, keys, seen, top_k, picked)
    look = look._replace(index=index, chosen=chosen)
  return look


def _causal(length: int) -> jax.Array:
  """Returns which tokens a query may see, [T T] bool."""
  return jnp.tril(jnp.ones((length, length), bool))


def _softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
  """Returns the softmax over what is seen, 0 elsewhere."""
  scores = jnp.where(seen, scores.astype(jnp.float32), MASKED)
  return jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0)


def _mla(attention: MLA, x: jax.Array, ctx: Context) -> jax.Array:
  """Returns the heads' attention [B H T T]."""
  qn, qr = attention.query(x, ctx.positions)
  c, kr = attention.latent(x, ctx.positions)
  keys = jnp.einsum('BSC,CHN->BSHN', c, attention.ups()[0])
  f32 = {'preferred_element_type': jnp.float32}
  scores = jnp.einsum('BTHN,BSHN->BHTS', qn, keys, **f32)
  scores += jnp.einsum('BTHR,BSR->BHTS', qr, kr, **f32)
  return _softmax(scores * attention.cfg.scale, _causal(x.shape[1]))


def _gqa(attention: GQA, x: jax.Array, ctx: Context) -> jax.Array:
  """Returns the heads' attention [B H T T]."""
  cfg = attention.cfg
  q, k, _ = attention.projections(x)
  if cfg.qk_norm:
    q, k = attention.q_norm(q), attention.k_norm(k)
  q, k = (rope(a, ctx.positions, cfg.rope) for a in (q, k))
  k = jnp.repeat(k, cfg.heads // cfg.kv_heads, axis=2)
  scores = jnp.einsum(
    'BTHK,BSHK->BHTS', q, k, preferred_element_type=jnp.float32
  )
  return _softmax(scores * cfg.scale, _causal(x.shape[1]))


def _indexed(
  query: IndexQuery,
  keys: jax.Array,
  seen: jax.Array,
  top_k: int,
  picked: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the indexer's softmax and what it picks, both [B T S].

  Args:
    query, keys: of the indexer.
    seen: [B T S], what it picks from.
    top_k: how many.
    picked: [B T K] places, where they are not the best of all.
  """
  scores = index_scores(query, keys)
  if picked is None:
    picked = best(scores, seen, min(top_k, seen.shape[-1]))
  slots = jnp.arange(seen.shape[-1])
  chosen = (picked[..., None] == slots).any(axis=-2)
  return _softmax(scores, seen), chosen


def _shared_kv(attention: SharedKV, x: jax.Array, ctx: Context) -> _Look:
  """Returns attention to window, entries and sink: one softmax over all."""
  cfg, at, T = attention.cfg, ctx.positions, x.shape[1]
  q, latent = attention.query(x, at)
  kv = attention.kv_norm(x @ attention.kv[...])
  kv = tail_rope(kv, at, cfg.layer_rope, cfg.rope_dim)
  back = jnp.arange(T)[:, None] - jnp.arange(T)
  near = jnp.broadcast_to((back >= 0) & (back < cfg.window), (len(x), T, T))
  keys, seen, view = kv, near, None
  if cfg.compress != 'none':
    entries, _ = attention.far.compressor(x, ctx, None)
    ratio = cfg.compressor().ratio
    view = compressor.view(ctx, ratio, True).mask(entries.shape[1])
    keys = jnp.concatenate([kv, entries], axis=1)
    seen = jnp.concatenate([near, view], axis=-1)
  scores = cfg.scale * jnp.einsum(
    'BTHC,BSC->BHTS', q, keys, preferred_element_type=jnp.float32
  )
  sinks = attention.sinks[...].astype(jnp.float32)[None, :, None, None]
  sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
  sunk = jnp.ones((*seen.shape[:-1], 1), bool)
  every = _softmax(
    jnp.concatenate([scores, sinks], axis=-1),
    jnp.concatenate([seen, sunk], axis=-1)[:, None],
  )
  tokens, entries, sinks = jnp.split(every, [T, every.shape[-1] - 1], axis=-1)
  look = _Look(tokens, entries if view is not None else None, sinks[..., 0])
  if cfg.compress == 'csa':
    indexer = attention.far.indexer
    keys, _ = indexer.compressor(x, ctx, None)
    query = indexer.query(x, latent, at)
    index, chosen = _indexed(query, keys, view, cfg.csa.top_k)
    look = look._replace(index=index, chosen=chosen)
  return look
