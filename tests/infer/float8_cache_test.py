"""A cache in float8: what it holds, what it costs, how far answers depart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.infer import sampling
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.paging import paging
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.attention.latent_reading import FP8Latent, Latent
from deepseek_jax.model.attention.mla import MLA, MLAConfig
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import ComputeConfig
from tests import tiny
from tests.infer import families

LATENT = MLAConfig(2, 12, 256, 8, 4, 6, rope=tiny.YARN)
DIM, T = 16, 12
FP8 = jnp.float8_e4m3fn


def model(cache, impl=None, dtype='float32', mtp=False):
  return ds.build(
    ds.TransformerConfig(
      tiny.VOCAB,
      32,
      ((('dense',), 2),),
      LATENT,
      FFNConfig(24),
      mtp=MTPConfig(int(mtp), 'dense'),
      # Logits of a size that rounding of the cache can move.
      init_std=0.2,
      compute=ComputeConfig(dtype=dtype, kernels=impl, cache=cache),
    )
  )


@functools.cache
def layer():
  """A module with random weights, and inputs [2 T D]."""
  graphdef, state = nnx.split(MLA(LATENT, DIM, std=1.0, rngs=nnx.Rngs(0)))
  weights = tiny.fill(nnx.to_pure_dict(state))
  x = np.random.default_rng(5).normal(size=(2, T, DIM))
  return nnx.merge(graphdef, weights), jnp.asarray(x, jnp.float32)


def run(x, past, at, count, fresh=False):
  positions = jnp.broadcast_to(jnp.arange(at, at + count), (2, count))
  ctx = Context(positions * 0, positions, None, fresh=fresh)
  return layer()[0](x[:, at : at + count], ctx, past)[:2]


def by_hand(c):
  """Latents [... C] as bytes and scales, number by number of a group."""
  groups = np.float32(c).reshape(-1, 128)
  q, scales = np.zeros_like(groups), np.zeros(len(groups), np.float32)
  for i, group in enumerate(groups):
    largest = np.float32(max(max(abs(n) for n in group), 1e-4))
    scales[i] = largest / np.float32(448)
    q[i] = (group * (np.float32(448) / largest)).astype(ml_dtypes.float8_e4m3fn)
  return q.reshape(c.shape), scales.reshape(*c.shape[:-1], -1)


class LayerTest(parameterized.TestCase):
  @parameterized.parameters(1, T - 1)  # absorbed, and with expanded keys
  def test_it_holds_and_reads_what_is_computed_by_hand(self, new):
    module, x = layer()
    # The first tokens are cached from the exact latents; the last ones, too.
    past = LATENT.cache(2, T, FP8)
    _, past = run(x, past, 0, T - new, fresh=True)
    got, past = run(x, past, T - new, new)
    self.assertIsInstance(past, FP8Latent)
    at = jnp.broadcast_to(jnp.arange(T), (2, T))
    want = module.latent(x, at)
    q, scales = by_hand(np.asarray(want.c))
    np.testing.assert_allclose(past.scales, scales, rtol=1e-6)
    # A scale one bit off may move a number to the next one of float8.
    off = np.asarray(past.c, np.float32) != q
    self.assertLess(off.mean(), 1e-3)
    kr = np.asarray(want.kr).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(past.kr, kr)
    # What is read are these numbers, in float32.
    c = np.asarray(past.c, np.float32) * np.repeat(past.scales, 128, axis=-1)
    same = Latent(jnp.asarray(c), jnp.asarray(kr, jnp.float32))
    positions = at[:, T - new :]
    y = module.absorbed(
      *module.query(x[:, T - new :], positions), same, positions
    )
    self.assertLess(tiny.relative(got, module.project(y)), 5e-6)

  def test_the_error_is_that_of_three_bits_of_mantissa(self):
    _, x = layer()
    exact, held = LATENT.cache(2, T, jnp.float32), LATENT.cache(2, T, FP8)
    _, exact = run(x, exact, 0, T - 1, fresh=True)
    _, held = run(x, held, 0, T - 1, fresh=True)
    want, got = run(x, exact, T - 1, 1)[0], run(x, held, T - 1, 1)[0]
    error = tiny.relative(got, want)
    # A number is off by at most 1/16 of itself; 0.018 was seen.
    self.assertBetween(error, 1e-3, 2**-4)


@functools.cache
def answers(cache, impl=None, drafts=0, mtp=False):
  """An engine, and the greedy answers with their log-probabilities."""
  made = model(cache, impl, mtp=mtp)
  # One shape of prefill and one of decoding: quick to compile.
  cfg = EngineConfig(
    slots=2,
    context=32,
    page=8,
    budget=16,
    steps=3,
    drafts=drafts,
    deterministic=True,
  )
  engine = Engine(made, tiny.draw(made), cfg)
  draws = Sampling(temperature=0)
  asked = [
    Request(tuple(range(1, n)), 8, draws, logprobs=0) for n in (5, 20, 11)
  ]
  found = [answer for (answer,) in engine.run(asked)]
  probs = [[p.logprob for p in a.logprobs] for a in found]
  return engine, [a.tokens for a in found], np.asarray(probs)


class AnswersTest(parameterized.TestCase):
  def test_an_engine_holds_what_the_planner_counts(self):
    engine, _, got = answers('float8')
    _, _, want = answers('compute')
    error = abs(got[:, 0] - want[:, 0]).max()
    self.assertBetween(error, 1e-6, 0.1)  # 0.02 was seen
    config = engine.model.config
    wanted = plan.cache(config).configured
    self.assertEqual(wanted, 2 * (256 + 4 * 2 + 2 * 4))
    # Pages of 8 tokens: 4 for each of 2 slots, and the scratch page.
    self.assertEqual(engine.stats['cache_bytes'], 9 * 8 * wanted)
    plain = model('compute', dtype='bfloat16')
    for one in (engine.model, plain):
      per_token = paging(build_flat(one), 8).token_bytes
      self.assertEqual(per_token, plan.cache(one.config).configured)

  def test_pages_read_in_place_answer_alike(self):
    _, tokens, want = answers('float8')
    _, other, got = answers('float8', impl='reference')
    self.assertEqual(tokens, other)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)

  def test_generate_takes_it(self):
    prompt = [list(range(1, 12))]
    found = []
    for cache in ('float8', 'compute'):
      made = model(cache)
      shapes = jax.eval_shape(lambda made=made: made.init_cache(1, 32)).layers
      found.append(
        sampling.sample(
          made,
          tiny.draw(made),
          prompt,
          sampling.SampleConfig(temperature=0),
          max_new_tokens=2,
        )
      )
      dtypes = {str(a.dtype) for a in jax.tree.leaves(shapes)}
      self.assertEqual('float8_e4m3fn' in dtypes, cache == 'float8')
    error = abs(found[0].log_probs[0, 1] - found[1].log_probs[0, 1])
    self.assertBetween(error, 1e-7, 0.1)

  @pytest.mark.slow
  def test_drafts_leave_its_answers_as_they_are(self):
    _, tokens, _ = answers('float8', mtp=True)
    _, drafted, _ = answers('float8', drafts=2, mtp=True)
    self.assertEqual(tokens, drafted)

  def test_prefixes_of_another_format_are_not_found(self):
    salts = []
    for cache in ('float8', 'compute'):
      made = model(cache)
      engine = Engine(made, tiny.draw(made), EngineConfig(slots=1, context=16))
      number = engine.submit(Request((1, 2), 1))
      salts.append(engine._live[number][0].salt)
    self.assertNotEqual(*salts)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters('gqa', 'dsa', 'v4', 'mla')
  def test_other_attentions_are_refused_in_a_line(self, name):
    config = families.config(name)
    compute = dataclasses.replace(config.compute, cache='float8')
    with self.assertRaisesRegex(
      ds.InputError,
      "compute.cache = 'float8': .* it takes MLA or DSA with kv_rank",
    ) as caught:
      dataclasses.replace(config, compute=compute)
    self.assertNotIn('\n', str(caught.exception))

  def test_an_unknown_format_is_named(self):
    with self.assertRaisesRegex(ds.InputError, "compute.cache = 'int8'"):
      ComputeConfig(cache='int8')


if __name__ == '__main__':
  absltest.main()
