"""Whole models of V4's parts: training, chunks, documents, and mixtures."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax.extend import core

import deepseek_jax as ds
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.context import Context
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from tests import tiny

T = 27
ATTENTION = SharedKVConfig(
  heads=2,
  head_dim=8,
  rope_dim=4,
  q_rank=6,
  groups=2,
  o_rank=5,
  window=5,
  csa=CSAConfig(ratio=4, top_k=3, index_heads=3, index_dim=6),
  hca=HCAConfig(ratio=8),
)


def jit(f):
  """Compiled quickly: these programs are small."""
  return jax.jit(f, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def config():
  base = ds.presets.v4_tiny()
  moe = dataclasses.replace(base.moe, experts=4, width=6)
  return dataclasses.replace(
    base,
    vocab_size=tiny.VOCAB,
    dim=12,
    attention=ATTENTION,
    moe=moe,
    kinds=ds.presets.v4_kinds(tiny.VOCAB),
    residual=HyperConnectionsConfig(streams=2, iterations=3),
  )


@functools.cache
def model_and_variables():
  model = ds.build(config())
  variables = model.init(jax.random.key(0))
  params = tiny.fill(variables['params'], 1)
  return model, {**variables, 'params': params}


@functools.cache
def run():
  """(tokens, segments, positions) -> logits of whole rows."""
  model, variables = model_and_variables()
  return jit(
    lambda t, s, p: model.apply(variables, t, segment_ids=s, positions=p).logits
  )


def whole(tokens):
  at = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return run()(tokens, np.ones_like(tokens), at)


class ModelTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_training_reaches_every_parameter(self):
    model, variables = model_and_variables()
    tokens = tiny.tokens(2, T)

    def loss(params):
      out = model.apply(
        {**variables, 'params': params}, tokens, train=True, mtp=True
      )
      total = (jax.nn.log_softmax(out.logits) ** 2).mean()
      total += sum((h**2).mean() for h in out.aux['mtp_hidden'])
      for stats in out.aux['segments'][0]:
        total += jnp.sum(stats['attention'].get('loss', 0.0))
      return total

    grads = jit(jax.grad(loss))(variables['params'])
    for path, grad in jax.tree.leaves_with_path(grads):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      self.assertTrue(np.isfinite(grad).all(), name)
      self.assertGreater(float(jnp.abs(grad).max()), 0, name)

  @pytest.mark.slow
  def test_ragged_chunks_after_a_ragged_prompt_equal_one_pass(self):
    model, variables = model_and_variables()
    tokens = tiny.tokens(3, T)
    want = np.asarray(whole(tokens))
    step = jit(
      lambda t, s, cache: model.apply(variables, t, segment_ids=s, cache=cache)
    )
    cache, done = model.init_cache(3, T), np.zeros(3, int)
    got = np.zeros_like(want)
    rng = np.random.default_rng(0)
    sizes = [[6, 1, 4], [5, 0, 3], [1, 6, 6]]
    while (done < T).any():
      new = np.array(sizes.pop(0)) if sizes else rng.integers(0, 7, 3)
      new = np.minimum(new, T - done)
      at = np.minimum(done[:, None] + np.arange(6), T - 1)
      part = tokens[np.arange(3)[:, None], at]
      valid = (np.arange(6) < new[:, None]).astype(np.int32)
      out = step(part, valid, cache)
      cache = out.cache
      for b in range(3):
        got[b, done[b] : done[b] + new[b]] = out.logits[b, : new[b]]
      done += new
    self.assertLess(tiny.relative(got, want), 1e-5)
    np.testing.assert_array_equal(cache.length, T)

  @pytest.mark.slow
  def test_documents_of_a_window_are_apart(self):
    batch = tiny.documents(2, T, padding=4)
    tokens, segments = batch['tokens'], batch['segments']
    got = run()(tokens, segments, batch['positions'])
    for b in range(2):
      for n in range(1, segments[b].max() + 1):
        at = np.flatnonzero(segments[b] == n)
        alone = np.zeros((2, T), np.int32)
        alone[0, : len(at)] = tokens[b, at]
        want = whole(alone)[0, : len(at)]
        self.assertLess(tiny.relative(got[b, at], want), 1e-5)

  @pytest.mark.slow
  def test_sampling_draws_what_the_model_predicts(self):
    model, variables = model_and_variables()
    prompt = tiny.tokens(1, 9)[0]
    new = ds.generate(
      model, variables, [prompt], max_new_tokens=6, temperature=0.0
    )[0]
    row = np.zeros((2, T), np.int32)
    row[0, :15] = [*prompt, *new]
    want = np.asarray(whole(row))[0, 8:14].argmax(axis=-1)
    self.assertEqual(new, want.tolist())


class MixtureTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('csa_with_softmax_router', 'csa', {'moe': tiny.V2_MOE}),
    ('hca_with_dense_ffn', 'hca', {'moe': None, 'layout': 'dense'}),
    ('mla_with_streams', tiny.MLA, {'residual': HyperConnectionsConfig(2)}),
    ('window_scanned', 'none', {'repeat': 2}),
  )
  @pytest.mark.slow
  def test_parts_compose(self, attention, change):
    if isinstance(attention, str):
      attention = dataclasses.replace(ATTENTION, compress=attention)
    kind = change.pop('layout', 'moe')
    repeat = change.pop('repeat', 1)
    cfg = dataclasses.replace(
      tiny.config('v3'),
      attention=attention,
      layout=(((kind,), repeat),),
      mtp=ds.model.mtp.MTPConfig(0),
      **change,
    )
    cfg = ds.from_dict(type(cfg), ds.to_dict(cfg))
    model = ds.build(cfg)
    variables = model.init(jax.random.key(0))

    def loss(params):
      out = model.apply({**variables, 'params': params}, tiny.tokens(1, 12))
      return (out.logits**2).mean()

    value, grads = jit(jax.value_and_grad(loss))(variables['params'])
    self.assertGreater(float(value), 0)
    self.assertTrue(all(np.isfinite(g).all() for g in jax.tree.leaves(grads)))


def largest(jaxpr) -> int:
  """Numbers of the biggest array that a program makes, loops included."""
  sizes = [
    math.prod(v.aval.shape)
    for eqn in jaxpr.eqns
    for v in eqn.outvars
    if hasattr(v.aval, 'shape')
  ]
  inner = [
    largest(sub)
    for eqn in jaxpr.eqns
    for sub in core.jaxprs_in_params(eqn.params)
  ]
  return max(sizes + inner, default=0)


class SizeTest(parameterized.TestCase):
  def test_no_array_grows_as_tokens_times_entries(self):
    csa = CSAConfig(top_k=8, index_heads=2, index_dim=4, block=16)
    cfg = dataclasses.replace(ATTENTION, compress='csa', csa=csa)
    module = cfg.build(12, std=1.0, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)

    def loss(state, x):
      at = jnp.arange(x.shape[1])[None]
      return nnx.merge(graphdef, state)(x, Context(at, at, None))[0].sum()

    def most(n):
      x = jax.ShapeDtypeStruct((1, n, 12), jnp.float32)
      grad = jax.make_jaxpr(jax.grad(loss, (0, 1)))(nnx.to_pure_dict(state), x)
      return largest(grad.jaxpr)

    # Four times as many tokens: sixteen times as many pairs with entries.
    self.assertLess(most(2048) / most(512), 4.5)
    self.assertLess(most(2048), 2048 * 512)


if __name__ == '__main__':
  absltest.main()
