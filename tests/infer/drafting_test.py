"""Speculation: the tokens are those of plain decoding, from fewer calls."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from scipy import stats

import deepseek_jax as ds
from deepseek_jax.errors import InputError
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.mtp import MTPConfig
from tests import tiny
from tests.infer import engine_test, families

CONTEXT = 64
CFG = EngineConfig(
  slots=3, context=CONTEXT, page=8, budget=16, steps=3, contexts=(CONTEXT,)
)


def model(name, depth=1):
  """Returns a family's model with multi-token prediction, and variables."""
  streams = name == 'v4'
  block = {'v4': 'window', 'v3': 'moe'}.get(name, 'dense')
  mtp = MTPConfig(depth, block, streams)
  made = ds.build(dataclasses.replace(families.config(name), mtp=mtp))
  variables = tiny.draw(made)
  if name == 'engram':
    own = families.variables(name)['buffers']
    variables = {**variables, 'buffers': own}
  return made, variables


def asked(count=5, new=15, seed=0, **sampling):
  rng = np.random.default_rng(seed)
  out = []
  for i in range(count):
    prompt = tuple(map(int, rng.integers(1, tiny.VOCAB, rng.integers(1, 30))))
    how = Sampling(seed=i, **sampling)
    out.append(Request(prompt, new, how, logprobs=1))
  return out


class LosslessTest(parameterized.TestCase):
  @parameterized.parameters(('gqa', 2, 1), ('v4', 2, 1))
  def test_tokens_are_those_of_plain_decoding(self, name, drafts, depth):
    self.check(name, drafts, depth)

  @parameterized.parameters(
    ('v3', 1, 1),
    ('v3', 3, 2),
    ('dsa', 2, 1),
    ('in_blocks', 2, 1),
    ('nsa', 2, 1),
    ('engram', 3, 1),
  )
  @pytest.mark.slow
  def test_tokens_of_other_families_are_too(self, name, drafts, depth):
    self.check(name, drafts, depth)

  def check(self, name, drafts, depth):
    made, variables = model(name, depth)
    for sampling in ({'temperature': 0}, {'frequency_penalty': 0.5}):
      requests = asked(**sampling)
      plain = Engine(made, variables, CFG).run(requests)
      cfg = dataclasses.replace(CFG, drafts=drafts)
      run = Engine(made, variables, cfg)
      guessed = run.run(requests)
      for (a,), (b,) in zip(plain, guessed):
        families.check_same(a, b)
      self.assertGreater(run.stats['drafts'], 0)


class FewRowsTest(absltest.TestCase):
  def test_a_chunk_may_fill_the_whole_context(self):
    made, variables = model('gqa')
    cfg = EngineConfig(slots=2, context=24, page=24, budget=24, steps=3)
    prompts = [tuple(range(1, n + 1)) for n in (23, 22, 9)]
    requests = [
      Request(p, 24 - len(p), Sampling(seed=1), logprobs=0) for p in prompts
    ]
    plain = Engine(made, variables, cfg).run(requests)
    run = Engine(made, variables, dataclasses.replace(cfg, drafts=2))
    run.warm_up()
    for (a,), (b,) in zip(plain, run.run(requests)):
      families.check_same(a, b)

  @pytest.mark.slow
  def test_a_mixed_trace_compiles_nothing_more(self):
    made, variables = model('v4')
    shapes = {'contexts': (16, CONTEXT), 'rows': (1, 3), 'steps': 2}
    cfg = dataclasses.replace(CFG, **shapes, drafts=2, draft_rows=1)
    run = Engine(made, variables, cfg)
    run.warm_up()
    before = run.stats['compilations']
    self.assertLen(run.run(engine_test.mixed()), 300)
    self.assertEqual(run.stats['compilations'], before)
    self.assertGreater(run.stats['drafts'], 0)

  def test_drafts_end_where_many_rows_run_and_begin_again(self):
    made, variables = model('gqa')
    requests = asked(temperature=0)
    requests[1] = dataclasses.replace(requests[1], max_new_tokens=30)
    plain = Engine(made, variables, CFG).run(requests)
    counts = []
    for most in (1, None):
      cfg = dataclasses.replace(CFG, drafts=2, draft_rows=most)
      run = Engine(made, variables, cfg)
      for (a,), (b,) in zip(plain, run.run(requests)):
        self.assertEqual(a.tokens, b.tokens)
      counts.append(run.stats['drafts'])
    # One row alone guesses at the end; with no bound all do, from the start.
    self.assertGreater(counts[0], 0)
    self.assertLess(counts[0], counts[1])


@dataclasses.dataclass
class Turns:
  """A grammar of turns: odd tokens, then even ones, thrice each; then the end.

  Its matcher is itself, and may give up at some place.
  """

  gives_up: int = -1
  taken: int = 0
  ended: bool = False

  def matcher(self, *_):
    return dataclasses.replace(self)

  copy = matcher

  def mask(self):
    if self.taken == self.gives_up:
      raise InputError('grammar: too many states')
    tokens = np.arange(-(-tiny.VOCAB // 32) * 32)
    bits = (tokens + self.taken // 3) % 2 == 1
    return np.packbits(bits, bitorder='little').view(np.int32)

  def accept(self, token):
    if (token + self.taken // 3) % 2 != 1:
      return False
    self.taken += 1
    self.ended = self.taken == 20
    return True


class GrammarTest(parameterized.TestCase):
  def test_tokens_under_a_grammar_are_those_of_plain_decoding(self):
    self.check(temperature=0.7)

  @pytest.mark.slow
  def test_so_are_those_of_the_models_own_distribution(self):
    self.check()

  def check(self, **sampling):
    # Four likely tokens: random drafts are often right.
    made, variables = model('gqa')
    bias = tuple((token, 9.0) for token in range(4))
    requests = asked(new=24, logit_bias=bias, **sampling)
    for i, grammar in ((0, Turns()), (1, Turns(gives_up=7)), (3, Turns())):
      requests[i] = dataclasses.replace(requests[i], grammar=grammar)
    text = engine_test.SmallBytes()
    plain = Engine(made, variables, CFG, text=text).run(requests)
    cfg = dataclasses.replace(CFG, drafts=2)
    run = Engine(made, variables, cfg, text=text)
    run.warm_up()
    before = run.stats['compilations']
    guessed = run.run(requests)
    self.assertEqual(run.stats['compilations'], before)
    for (a,), (b,) in zip(plain, guessed):
      self.assertEqual(a.tokens, b.tokens)
      self.assertEqual(a.finish, b.finish)
    self.assertEqual(
      [a.finish for (a,) in guessed],
      ['stop', 'error', 'length', 'stop', 'length'],
    )
    # An answer under a grammar gets drafts too, and keeps some.
    self.assertGreater(guessed[0][0].usage.accepted_drafts, 3)
    self.assertEqual(run.stats['pages_free'], run.stats['pages'])


class CacheTest(parameterized.TestCase):
  @parameterized.parameters('gqa', 'v3', 'v4')
  @pytest.mark.slow
  def test_it_holds_of_what_stays_what_plain_decoding_writes(self, name):
    plain, after = self.rows(name, 0), self.rows(name, 2)
    self.assertNotEmpty(plain)
    for want, got in zip(plain, after):
      # The last token may be cached or not yet.
      size = min(len(want), len(got))
      self.assertGreater(size, 3)
      self.assertLess(abs(len(want) - len(got)), 3)
      np.testing.assert_allclose(got[:size], want[:size], rtol=1e-5, atol=1e-5)

  @parameterized.parameters('in_blocks', 'nsa', 'v3')
  @pytest.mark.slow
  def test_a_shared_beginning_holds_what_one_of_its_own_does(self, name):
    made, variables = model(name)
    shape = {'slots': 1, 'rows': (1,), 'drafts': 2, 'snapshots': 9}
    engine = lambda: Engine(made, variables, dataclasses.replace(CFG, **shape))
    first = tuple(range(1, 18))  # two pages and the token after
    ask = lambda prompt: Request(prompt, 15, Sampling(temperature=0))
    run = engine()
    [[begun]] = run.run([ask(first)])
    # Others that go on from two pages: with the same token and another one.
    run.run([ask((*first, 42)), ask((*first[:16], 40, 41))])
    before = run.stats['cached_tokens']
    self.assertGreaterEqual(before, 16)
    request = ask((*first, *begun.tokens[:9], 43))
    shared = self.cached(run, request, drafts=2)
    self.assertEqual(run.stats['cached_tokens'] - before, 24)
    for want, got in zip(
      self.cached(engine(), request, drafts=2), shared, strict=True
    ):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  def rows(self, name, drafts):
    """Returns of each array in pages the rows [n ...] of one answer."""
    made, variables = model(name)
    shape = {'slots': 1, 'rows': (1,), 'reuse': False, 'drafts': drafts}
    run = Engine(made, variables, dataclasses.replace(CFG, **shape))
    return self.cached(run, *asked(1, new=25, temperature=0))

  def cached(self, run, request, drafts=0):
    """Returns the rows that wait for none of so many drafts."""
    (one,) = run._live[run.submit(request)]
    pages, n = [], 0
    while run.busy():
      run.step()
      pages, n = list(one.pages) or pages, max(n, one.cached)
    self.assertGreater(n, len(request.prompt) + 10)
    n -= drafts and 1 + drafts
    leaves = [leaf for leaf in run._paging.leaves if leaf.ratio]
    return [
      # [repeat M P/ratio ...] -> [P/ratio of all pages, repeat ...]
      np.concatenate(np.asarray(a)[:, pages].swapaxes(0, 1), axis=1)[
        :, : n // leaf.ratio - leaf.shift
      ].swapaxes(0, 1)
      for leaf, a in zip(leaves, run._store.pages)
    ]


def of_four_tokens(name):
  """Returns a family's model of four tokens, whose drafts are often right."""
  block = {'v4': 'window', 'v3': 'moe'}.get(name, 'dense')
  mtp = MTPConfig(1, block, name == 'v4')
  made = ds.build(
    dataclasses.replace(families.config(name), vocab_size=4, mtp=mtp)
  )
  return made, tiny.draw(made)


class ChanceTest(parameterized.TestCase):
  """Holds what many seeds draw, and the drafts that stay, to the chances."""

  PROMPT, HEAT, SEEDS = (1, 3, 0, 2, 2), 0.7, 64 * 64

  def drawn(self, model, new, drafts):
    """Returns the tokens of all seeds [N new], and how many drafts stayed."""
    made, variables = model
    slots = 64
    cfg = dataclasses.replace(
      CFG, slots=slots, rows=(slots,), drafts=drafts, queue=self.SEEDS
    )
    requests = [
      Request(self.PROMPT, new, Sampling(self.HEAT, seed=seed), n=64)
      for seed in range(0, self.SEEDS, 64)
    ]
    groups = Engine(made, variables, cfg).run(requests)
    answers = [answer for group in groups for answer in group]
    kept = sum(a.usage.accepted_drafts for a in answers)
    return np.array([a.tokens for a in answers]), kept

  def soft(self, logits):
    scaled = np.exp(np.float64(logits) / self.HEAT)
    return scaled / scaled.sum(-1, keepdims=True)

  def test_sequences_are_as_likely_as_the_model_says(self):
    self.check_sequences('gqa', 2)

  @parameterized.parameters(('gqa', 0), ('v3', 2), ('v4', 2))
  @pytest.mark.slow
  def test_so_are_those_of_others(self, name, drafts):
    self.check_sequences(name, drafts)

  def check_sequences(self, name, drafts):
    model = of_four_tokens(name)
    tokens, _ = self.drawn(model, 3, drafts)
    every = np.array(list(itertools.product(range(4), repeat=3)))
    rows = np.concatenate(
      [np.tile(np.int32(self.PROMPT), (64, 1)), every], axis=1
    )
    out = jax.jit(model[0].apply)(model[1], rows[:, :-1].astype(np.int32))
    odds = self.soft(out.logits[:, -3:])
    odds = np.take_along_axis(odds, every[..., None], -1)[..., 0].prod(-1)
    self.assertAlmostEqual(odds.sum(), 1, places=5)
    seen = np.bincount(tokens @ [16, 4, 1], minlength=64)
    found = stats.chisquare(seen, odds / odds.sum() * len(tokens))
    self.assertGreater(found.pvalue, 1e-4)

  def test_a_draft_stays_as_often_as_noise_that_both_share_says(self):
    self.check_share('gqa')

  @parameterized.parameters('v3', 'v4')
  @pytest.mark.slow
  def test_so_does_one_of_others(self, name):
    self.check_share(name)

  def check_share(self, name):
    made, variables = model = of_four_tokens(name)
    _, kept = self.drawn(model, 2, 1)
    prompt = np.array([self.PROMPT], np.int32)
    out = jax.jit(functools.partial(made.apply, mtp=True))(variables, prompt)
    # The state before the last token, with that token, guesses the next one.
    guess = out.aux['mtp_hidden'][0][0, -2] @ made.head(variables)
    p, q = self.soft(out.logits[0, -1]), self.soft(guess)
    # Both take x where x wins with Gumbel noise against every y, twice.
    ratios = np.maximum(p[:, None] / p, q[:, None] / q)
    share = (1 / ratios.sum(0)).sum()
    self.assertBetween(share, 0.1, 0.95)
    found = stats.binomtest(kept, self.SEEDS, share)
    self.assertGreater(found.pvalue, 1e-4)
    # Less than the best rule, and no less than what `match` promises.
    apart = np.abs(p - q).sum() / 2
    self.assertLess(share, 1 - apart + 1e-9)
    self.assertGreater(share, (1 - apart) / (1 + apart) - 1e-9)


class AcceptanceTest(parameterized.TestCase):
  @parameterized.parameters(['gqa'])
  def test_drafts_stay_as_often_as_training_says(self, name):
    self.check(name)

  @parameterized.parameters('v3', 'v4')
  @pytest.mark.slow
  def test_so_do_those_of_other_families(self, name):
    self.check(name)

  def check(self, name):
    made, variables = of_four_tokens(name)
    rng = np.random.default_rng(0)
    greedy = Sampling(temperature=0)
    requests = [
      Request(tuple(map(int, rng.integers(0, 4, n))), 30, greedy)
      for n in (2, 9, 17)
    ]
    # With reuse a call ends at each full page, drafts or not.
    cfg = dataclasses.replace(CFG, drafts=1, reuse=False)
    answers = Engine(made, variables, cfg).run(requests)
    taught = jax.jit(functools.partial(made.apply, mtp=True))
    accepted = 0
    for request, (answer,) in zip(requests, answers):
      tokens = request.prompt + answer.tokens
      padded = np.zeros((1, CONTEXT), np.int32)
      padded[0, : len(tokens)] = tokens
      real = (np.arange(CONTEXT) < len(tokens)).astype(np.int32)[None]
      out = taught(variables, padded, segment_ids=real)
      head = made.head(variables)
      guessed = np.asarray(out.aux['mtp_hidden'][0][0] @ head).argmax(axis=-1)
      at, want = len(request.prompt) - 1, 0
      while at < len(tokens) - 1:
        # The state before the last token and that token guess the next one.
        hit = guessed[at - 1] == tokens[at + 1] and at + 2 < len(tokens)
        want += hit
        at += 1 + hit
      self.assertEqual(answer.usage.accepted_drafts, want)
      accepted += want
    self.assertGreater(accepted, 5)


if __name__ == '__main__':
  absltest.main()
