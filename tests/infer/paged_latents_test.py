"""Decoding on the engine's own pages gives what decoding of gathered ones does.

A kernel's reference stands in its place; on a named Hopper GPU the programs are
traced alone.
"""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.extend import core

import deepseek_jax as ds
from deepseek_jax.infer import host_arrays
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.paging import paging
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.infer.programs import Shape, plain
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.attention.latent_reading import Latent
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.paged_latent import PagedLatent, last_first
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.stacks import unstack
from deepseek_jax.model.transformer_config import ComputeConfig
from pallas_kernels import dispatch, target
from tests import tiny
from tests.infer import families
from tests.infer.drafting_test import Turns
from tests.infer.engine_test import SmallBytes

CFG = EngineConfig(
  slots=3, context=64, page=8, budget=16, steps=3, contexts=(64,)
)
# What the kernel takes.
LATENT = MLAConfig(2, None, 512, 128, 64, 128)


def asked(count=4, new=12):
  rng = np.random.default_rng(0)
  draw = lambda: tuple(
    map(int, rng.integers(1, tiny.VOCAB, rng.integers(1, 30)))
  )
  # The last one ends at the last slot of its pages.
  prompts = [draw() for _ in range(count)] + [tuple(range(1, 50))]
  greedy = Sampling(temperature=0)
  last = 64 - len(prompts[-1])
  sizes = [new] * count + [last]
  return [Request(p, n, greedy, logprobs=0) for p, n in zip(prompts, sizes)]


def shared(sizes=(1, 9, 5, 3), grammars=()):
  """Requests of one beginning, longer than two pages, for few likely tokens.

  Drafts are often right, and right or wrong by what is cached.
  """
  rng, first = np.random.default_rng(1), tuple(range(1, 18))
  draw = lambda n: tuple(map(int, rng.integers(1, tiny.VOCAB, n)))
  bias = tuple((token, 9.0) for token in range(4))
  greedy = Sampling(temperature=0, logit_bias=bias)
  made = [Request(first + draw(n), 30, greedy, logprobs=0) for n in sizes]
  for i, grammar in enumerate(grammars):
    made[i] = dataclasses.replace(made[i], grammar=grammar)
  return made


def answers(
  config,
  variables,
  impl,
  drafts=0,
  spoil=False,
  given=None,
  text=None,
  **fields,
):
  """Returns an engine's answers, the operations it took, and the engine."""
  compute = dataclasses.replace(config.compute, kernels=impl)
  model = ds.build(dataclasses.replace(config, compute=compute))
  cfg = dataclasses.replace(CFG, drafts=drafts, **fields)
  run = Engine(model, variables, cfg, text=text)
  if spoil:
    nan = lambda a: jnp.full_like(a, jnp.nan)
    run._store = jax.tree.map(nan, run._store)
  with dispatch.recorded() as choices:
    found = [answer for (answer,) in run.run(given or asked())]
  return found, {(c.op, c.shapes) for c in choices}, run


def program(
  drafts,
  rows=4,
  page=64,
  dtype='bfloat16',
  latent=LATENT,
  cache='compute',
  device=('cuda', '9.0'),
  which='decode',
):
  """The loop of decoding and its choices, by default for a Hopper GPU."""
  config = ds.TransformerConfig(
    vocab_size=64,
    dim=256,
    layout=((('dense',), 2),),
    attention=latent,
    ffn=FFNConfig(256),
    mtp=MTPConfig(1 if drafts else 0, 'dense'),
    compute=ComputeConfig(dtype=dtype, cache=cache),
  )
  model = ds.build(config)
  paged = paging(build_flat(model), page, drafts)
  bucket = host_arrays.Bucket(rows, 1, 3)
  given = (
    jax.eval_shape(
      lambda: unstack(config, model.cast(model.init(jax.random.key(0))))
    ),
    jax.eval_shape(lambda: paged.empty(13, rows)),
    host_arrays.rows([], bucket, []),
    host_arrays.going([], bucket, [], host_arrays.Ahead(2, drafts, 2)),
    host_arrays.draws([], bucket, paged.page, 64),
  )
  run = getattr(plain(model, Shape(paged, 2, rows, False)), which)
  dispatch.say_once.cache_clear()
  with target.targeting(*device), dispatch.recorded() as choices:
    made = jax.make_jaxpr(run)(*given)
  return made.jaxpr, choices


def arrays(jaxpr):
  """Yields the shapes of all that a program makes, loops included."""
  for eqn in jaxpr.eqns:
    for v in eqn.outvars:
      yield getattr(v.aval, 'shape', ())
    for sub in core.jaxprs_in_params(eqn.params):
      yield from arrays(sub)


def whole_rows(jaxpr, rows, slots, width):
  """The arrays of latents of all slots of all rows, whatever their axes."""
  sizes = rows * slots * width
  return [
    s for s in arrays(jaxpr) if s[-1:] == (width,) and np.prod(s) == sizes
  ]


def traced(*args, **how):
  return program(*args, **how)[1]


class AnswersTest(parameterized.TestCase):
  def check(self, name, drafts, **how):
    config = families.config(name)
    if drafts:
      config = dataclasses.replace(config, mtp=MTPConfig(1, 'moe'))
    variables = tiny.draw(ds.build(config))
    own, _, _ = answers(config, variables, None, drafts, **how)
    pages, seen, run = answers(config, variables, 'reference', drafts, **how)
    for a, b in zip(own, pages, strict=True):
      families.check_same(a, b)
      self.assertEqual(a.usage, b.usage)
    # Pools of the store's pages, not gathered rows; W tokens a request.
    pool = f'float32[{run._store.pages[0].shape[1]},8,'
    decoded = [shapes for op, shapes in seen if op == 'mla_decode']
    self.assertTrue(any(pool in shapes for shapes in decoded), decoded)
    for pool in run._store.pages:
      self.assertEqual(float(abs(pool[:, 0]).max()), 0)
    spoiled, _, _ = answers(
      config, variables, 'reference', drafts, spoil=True, **how
    )
    self.assertEqual(spoiled, pages)
    return run

  def test_pages_answer_as_gathered_rows_do(self):
    self.check('mla', 0)

  @parameterized.parameters(1, 3)
  @pytest.mark.slow
  def test_so_they_do_with_drafts(self, drafts):
    self.check('v3', drafts)

  @pytest.mark.slow
  def test_shared_beginnings_and_preempted_answers_do_with_drafts(self):
    run = self.check('v3', 2, given=shared(), pages=14)
    self.assertGreater(run.stats['preempted'], 0)
    self.assertGreater(run.stats['cached_tokens'], 0)
    self.assertGreater(run.stats['accepted_drafts'], 10)

  @pytest.mark.slow
  def test_so_do_drafts_that_a_grammar_has_read_ahead(self):
    given = shared((1, 9), (Turns(),))
    run = self.check('v3', 2, given=given, text=SmallBytes())
    self.assertGreater(run.stats['accepted_drafts'], 3)


class TracedTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 3)
  def test_on_hopper_pages_of_64_go_to_the_kernel(self, drafts):
    choices = traced(drafts)
    decoded = {c.shapes for c in choices if c.op == 'mla_decode'}
    # A step of the model and of the block that drafts, then one draft alone.
    widths = {1, 1 + drafts} if drafts > 1 else {1 + drafts}
    self.assertLen(decoded, len(widths))
    for shapes, W in zip(sorted(decoded), sorted(widths)):
      self.assertStartsWith(shapes, f'bfloat16[4,{W},2,512]')
      self.assertIn('[13,64,512] bfloat16[13,64,64] int32[4,3]', shapes)
    stored = [c for c in choices if c.op == 'latent_kv']
    self.assertTrue(any('bfloat16[13,64,512]' in c.shapes for c in stored))
    self.assertEqual({c.impl for c in choices}, {'gpu'})

  @parameterized.parameters(
    ({}, 'tpu', '[13,64,512] bfloat16[13,64,64] int32[4,3]'),
    ({'page': 16, 'dtype': 'float32'}, 'tpu', 'float32[13,16,64] int32[4,3]'),
    ({'page': 8}, 'reference', 'bfloat16[4,24,64]'),
    ({'cache': 'float8'}, 'reference', 'bfloat16[4,192,64]'),
  )
  def test_on_a_tpu_pages_that_its_kernel_takes_go_to_it(
    self, how, impl, shapes
  ):
    choices = traced(1, **how, device=('tpu',))
    decoded = [c for c in choices if c.op == 'mla_decode']
    self.assertEqual({c.impl for c in decoded}, {impl})
    self.assertTrue(any(shapes in c.shapes for c in decoded), decoded)

  @parameterized.parameters(('decode', 0), ('decode', 3), ('draft', 3))
  def test_no_row_is_gathered_not_even_by_drafts(self, which, drafts):
    made, _ = program(drafts, which=which)
    self.assertEmpty(whole_rows(made, 4, 192, 512))

  def test_pages_in_float8_go_to_the_kernel_with_their_scales(self):
    choices = traced(1, cache='float8')
    pools = 'float8_e4m3fn[13,64,512] bfloat16[13,64,64]'
    shapes = {
      op: [c.shapes for c in choices if c.op == op]
      for op in ('mla_decode', 'latent_kv')
    }
    decoded = [s for s in shapes['mla_decode'] if pools in s]
    self.assertLen(set(decoded), 1)
    self.assertIn('float32[13,64,4]', decoded[0])
    stored = [s for s in shapes['latent_kv'] if 'float8_e4m3fn[13,64' in s]
    self.assertNotEmpty(stored)
    self.assertEqual({c.impl for c in choices}, {'gpu'})

  @parameterized.parameters(
    ({'page': 32}, '32 tokens a page, not 64'),
    ({'dtype': 'float32', 'cache': 'float8'}, 'dtype float32/bfloat16, not'),
    ({'dtype': 'float32'}, 'not bfloat16'),
    (
      {'latent': dataclasses.replace(LATENT, kv_rank=256)},
      'latent 256 and rope 64',
    ),
  )
  def test_what_is_gathered_says_why(self, how, reason):
    with self.assertLogs('pallas_kernels', logging.WARNING) as logs:
      choices = traced(0, **how)
    said = [line for line in logs.output if 'gathers its pages' in line]
    self.assertLen(said, 1)
    self.assertIn(reason, said[0])
    self.assertNotIn('[13,', ' '.join(c.shapes for c in choices))


class PagedLatentTest(parameterized.TestCase):
  def test_tokens_outside_of_their_pages_are_written_nowhere(self):
    table = jnp.asarray([[2, 0], [1, -1]])
    pages = Latent(jnp.zeros((3, 4, 2)), jnp.zeros((3, 4, 1)))
    held = PagedLatent(pages, table)
    at = jnp.asarray([[3, 4, 8], [2, 4, 5]])
    valid = jnp.asarray([[True, True, True], [False, True, True]])
    want = [[11, 0, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(held.slots(at, valid), want)

  def test_the_tokens_that_count_go_last_and_come_back(self):
    x = jnp.arange(8).reshape(2, 4, 1)
    count = jnp.asarray([3, 4])
    turned = last_first(x, count)
    want = [[3, 0, 1, 2], [4, 5, 6, 7]]
    np.testing.assert_array_equal(turned[..., 0], want)
    np.testing.assert_array_equal(last_first(turned, -count), x)


if __name__ == '__main__':
  absltest.main()
