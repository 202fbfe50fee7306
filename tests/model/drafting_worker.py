"""Drafting with the blocks of multi-token prediction, in chunks over a cache.

python -m tests.model.drafting_worker NAME: on two devices, against one.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as ds
from deepseek_jax.parallel import sharding
from tests import tiny
from tests.model import composition_test, v4_model_test
from tests.parallel.context_worker import mesh_of

T = 14
RULES = {'batch': 'data', 'heads': 'tensor', 'kv_heads': 'tensor'}


@functools.cache
def model(name: str) -> ds.Model:
  """V3's block, one of V3.2, V4's, or two depths ('dense_mtp')."""
  if name == 'v4':
    return ds.build(v4_model_test.config())
  if name == 'v32':
    attention = composition_test.ATTENTIONS['dsa']
    return ds.build(dataclasses.replace(tiny.config('v3'), attention=attention))
  return tiny.model(name)


@functools.cache
def variables(name: str) -> dict:
  made = jax.jit(model(name).init)(jax.random.key(0))
  return {**made, 'params': tiny.fill(made['params'])}


@functools.cache
def tokens() -> np.ndarray:
  return tiny.tokens(2, T)


@functools.cache
def drafting(name: str, using: sharding.Using | None):
  """The compiled `draft` of a model, on a mesh or on one device."""
  del using
  return jax.jit(model(name).draft, static_argnames='depth')


@functools.cache
def taught(name: str) -> tuple[list, jax.Array]:
  """Computes as training does: logits of each depth, what depth 1 takes."""
  net = model(name)

  def run(variables, tokens):
    out = net.apply(variables, tokens, mtp=True, mtp_state=True)
    head = net.head(net.cast(variables))
    return [h @ head for h in out.aux['mtp_hidden']], out.aux['mtp_state']

  return jax.jit(run)(variables(name), tokens())


def drafted(name: str, chunks: tuple, state: jax.Array, depth: int = 1):
  """(logits, states) of a depth, with the right tokens, row 1 a chunk late.

  Args:
    chunks: sizes of the calls; the last one is repeated.
    state: [B T ...], what the depth takes.
    depth: of the block.
  """
  net, count = model(name), T - depth
  run = drafting(name, sharding.current())
  cache, done = net.init_mtp_cache(2, T), np.array([0, 0])
  rows, logits = np.arange(2)[:, None], np.zeros((2, T, tiny.VOCAB))
  states, call = np.zeros(state.shape), 0
  while (done < count).any():
    width = chunks[min(call, len(chunks) - 1)]
    new = np.minimum([width, width if call else 0], count - done)
    at = done[:, None] + np.arange(width)
    valid = np.arange(width) < new[:, None]
    kept = np.minimum(at, count - 1)
    out = run(
      variables(name),
      jnp.asarray(state)[rows, kept],
      tokens()[rows, kept + depth],
      cache,
      at.astype(np.int32),
      valid,
      depth=depth,
    )
    for b in range(2):
      to = slice(done[b], done[b] + new[b])
      logits[b, to] = out.logits[b, : new[b]]
      states[b, to] = out.state[b, : new[b]]
    cache, done, call = out.cache, done + new, call + 1
  return logits[:, :count], states


def main(name: str) -> dict:
  config = model(name).config
  streams = (config.residual.streams,) if config.mtp.streams else ()
  state = np.random.default_rng(0).normal(size=(2, T, *streams, config.dim))
  state = state.astype(np.float32)
  one, _ = drafted(name, (3,), state)
  found = {}
  for axis in ('data', 'tensor'):
    mesh = mesh_of(**{'data': 1, 'tensor': 1} | {axis: 2})
    with sharding.use(mesh, RULES):
      many, _ = drafted(name, (3,), state)
    found[axis] = tiny.relative(many, one)
  return found


if __name__ == '__main__':
  print(json.dumps(main(*sys.argv[1:])))
