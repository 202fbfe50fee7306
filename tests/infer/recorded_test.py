"""Records of an engine for training: experts of tokens, kept tokens."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.infer import kept_tokens
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from tests import tiny

PROMPTS = ((5, 9, 11, 4, 4, 17), (7, 20), (5,))


@functools.cache
def engine(**fields):
  cfg = EngineConfig(
    slots=3,
    context=32,
    page=8,
    budget=4,
    steps=3,
    contexts=(32,),
    rows=(3,),
    **fields,
  )
  return Engine(tiny.model('step'), tiny.variables('step'), cfg)


@functools.cache
def applied():
  return jax.jit(tiny.model('step').apply)


def live(tokens):
  """Experts [T L K] and logits [T V] of a whole sequence."""
  out = applied()(tiny.variables('step'), np.array([tokens], np.int32))
  experts = np.asarray(ds.moe_statistics(out.aux, 'experts'))
  return experts.transpose(1, 2, 0, 3)[0], np.float64(out.logits[0])


def kept_by(logits, top_k, top_p):
  """Returns the tokens that a draw may take, [V] bool."""
  order = np.argsort(-logits, kind='stable')
  probs = np.exp(logits - logits.max())
  if top_k:
    probs[order[top_k:]] = 0
  probs /= probs.sum()
  before = np.cumsum(probs[order]) - probs[order]
  keep = np.zeros(len(logits), bool)
  keep[order[(before < top_p) & (probs[order] > 0)]] = True
  return keep


class RoutesTest(parameterized.TestCase):
  def test_they_are_those_of_the_training_model(self):
    self.check(engine(routing=True, kept=True))

  @pytest.mark.slow
  def test_they_are_with_drafts(self):
    run = engine(routing=True, kept=True, drafts=1)
    self.check(run)
    self.assertGreater(run.stats['drafts'], 0)

  @pytest.mark.slow
  def test_what_was_computed_again_keeps_the_first(self):
    run = engine(routing=True, pages=5)
    self.check(run)
    self.assertGreater(run.stats['preempted'], 0)

  def check(self, run):
    asked = [
      Request(prompt, 12, Sampling(seed=n), n=2, routes=True)
      for n, prompt in enumerate(PROMPTS)
    ]
    answers = [(r, a) for r, each in zip(asked, run.run(asked)) for a in each]
    for request, answer in answers:
      tokens = (*request.prompt, *answer.tokens)
      routes, _ = live(tokens)
      self.assertEqual(answer.routes.shape, routes.shape)
      self.assertEqual(answer.routes.dtype, np.int16)
      # The last token was not read.
      self.assertTrue((answer.routes[-1] == -1).all())
      np.testing.assert_array_equal(
        np.sort(answer.routes[:-1]), np.sort(routes[:-1])
      )

  def test_a_shared_prefix_has_none(self):
    run = engine(routing=True, kept=True)
    long = tuple(range(1, 20))
    asked = Request(long, 4, Sampling(seed=0), routes=True)
    [[first]], [[second]] = run.run([asked]), run.run([asked])
    self.assertEqual(second.usage.cached_tokens, 16)
    self.assertTrue((second.routes[:16] == -1).all())
    np.testing.assert_array_equal(second.routes[16:], first.routes[16:])

  def test_nothing_is_given_that_was_not_asked_for(self):
    [[answer]] = engine(routing=True, kept=True).run([Request(PROMPTS[0], 4)])
    self.assertIsNone(answer.routes)
    self.assertIsNone(answer.kept)

  def test_what_an_engine_does_not_keep_is_refused(self):
    for name, config in (('routes', 'routing'), ('kept', 'kept')):
      with self.assertRaisesRegex(
        ds.InputError, f'{name}: .*EngineConfig.{config}=True'
      ):
        engine().submit(Request(PROMPTS[0], **{name: True}))
    dense = tiny.model('llama'), tiny.variables('llama')
    run = Engine(*dense, EngineConfig(routing=True, context=32, slots=2))
    with self.assertRaisesRegex(ds.InputError, 'a model that has some'):
      run.submit(Request(PROMPTS[0], routes=True))


class KeptTest(parameterized.TestCase):
  @parameterized.parameters((0, 0.7), (9, 0.8), (0, 1.0))
  def test_they_are_what_the_cuts_left(self, *cuts):
    self.check(engine(routing=True, kept=True), cuts)

  @pytest.mark.slow
  def test_they_are_with_drafts(self):
    self.check(engine(routing=True, kept=True, drafts=1), (5, 0.9))

  def check(self, run, cuts):
    top_k, top_p = cuts
    how = {'top_k': top_k, 'top_p': top_p, 'temperature': 0.8}
    asked = [
      Request(p, 6, Sampling(**how, seed=n), kept=True, logprobs=0)
      for n, p in enumerate(PROMPTS)
    ]
    for request, [answer] in zip(asked, run.run(asked)):
      _, logits = live((*request.prompt, *answer.tokens))
      start = len(request.prompt) - 1
      found = np.asarray(kept_tokens.unpacked(answer.kept, tiny.VOCAB))
      self.assertLen(found, len(answer.tokens))
      for n, token in enumerate(answer.tokens):
        own = logits[start + n] / 0.8
        want = kept_by(own, top_k, top_p)
        np.testing.assert_array_equal(found[n], want)
        self.assertTrue(found[n, token])
        mass = np.log(np.exp(own - own.max())[want].sum())
        self.assertAlmostEqual(
          answer.logprobs[n].sampled,
          own[token] - own.max() - mass,
          places=4,
        )


if __name__ == '__main__':
  absltest.main()
