"""Long runs of the engine: where batches and drafts differ, they are near-ties.

`make engine` prints what was compared.
"""

import dataclasses

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.mtp import MTPConfig
from tests import tiny
from tests.infer import families

pytestmark = pytest.mark.slow
PROMPTS, NEW, CONTEXT = 20, 2000, 2048
GREEDY = Sampling(temperature=0)
CFG = EngineConfig(
  slots=PROMPTS, context=CONTEXT, budget=64, steps=16, rows=(1, PROMPTS)
)


def built(name):
  """A family's model with one block of multi-token prediction."""
  mtp = MTPConfig(1, 'window' if name == 'v4' else 'dense', name == 'v4')
  made = ds.build(dataclasses.replace(families.config(name), mtp=mtp))
  return made, tiny.draw(made)


def requests():
  rng = np.random.default_rng(0)
  draw = lambda: tuple(map(int, rng.integers(1, tiny.VOCAB, 24)))
  return [Request(draw(), NEW, GREEDY, logprobs=2) for _ in range(PROMPTS)]


def gap(answer, at):
  """The difference of the two best logits where a token was drawn."""
  (_, best), (_, second) = answer.logprobs[at].top
  return best - second


class LongTest(parameterized.TestCase):
  @parameterized.parameters('gqa', 'v3', 'v4')
  def test_drafts_change_no_greedy_token_but_for_near_ties(self, name):
    made, variables = built(name)
    plain = Engine(made, variables, CFG).run(requests())
    run = Engine(made, variables, dataclasses.replace(CFG, drafts=2))
    self.compare(name, 'drafts', plain, run.run(requests()))
    stats = run.stats
    print(
      f'{name}: {stats["accepted_drafts"]} of {stats["drafts"]} drafts stay'
    )

  @parameterized.parameters('gqa', 'v3', 'v4')
  def test_one_row_and_twenty_give_the_same_but_for_near_ties(self, name):
    made, variables = built(name)
    together = Engine(made, variables, CFG).run(requests())
    alone = Engine(made, variables, CFG)
    some = [alone.run([request])[0] for request in requests()[:4]]
    self.compare(name, 'alone', together[:4], some)

  def compare(self, name, what, first, second):
    """Checks that answers are equal up to a near-tie, and counts those.

    Of two tokens, or of two experts or index entries, which rounding may choose
    otherwise: then log-probabilities part there.
    """
    ties, turns, compared, worst = 0, 0, 0, 0.0
    for request, (a,), (b,) in zip(requests(), first, second):
      differ = [i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y]
      end = differ[0] if differ else NEW
      if differ:
        self.assertLess(gap(a, end), 1e-5)
        ties += 1
      compared += end
      logs = lambda answer, n=end: np.array(
        [p.logprob for p in answer.logprobs[:n]]
      )
      apart = np.abs(logs(a) - logs(b))
      parted = np.nonzero(apart > 1e-4)[0]
      if parted.size:
        self.check_rounding_parts(name, request, a, int(parted[0]))
        turns, compared = turns + 1, compared - end + int(parted[0])
        apart = apart[: parted[0]]
      worst = max(worst, float(apart.max(initial=0)))
    self.assertLess(worst, 1e-4)
    self.assertLessEqual(turns, 2)
    print(
      f'{name}, {what}: {compared} tokens compared, {ties} near-ties of tokens,'
      f' {turns} of experts or index entries, largest difference of a'
      f' log-probability {worst:.1e}'
    )

  def check_rounding_parts(self, name, request, answer, at):
    """The trainer's forward parts at that token, too, by weights' rounding."""
    made, variables = built(name)
    row = np.array([[*request.prompt, *answer.tokens]], np.int32)
    places = np.arange(len(request.prompt) - 1, row.shape[1] - 1)
    run = jax.jit(
      lambda v: jax.nn.log_softmax(made.apply(v, row[:, :-1]).logits)
    )
    logs = lambda v: np.asarray(run(v))[0, places, row[0, places + 1]]
    want, rng, found = logs(variables), np.random.default_rng(0), []
    for _ in range(12):
      moved = jax.tree.map(
        lambda p: np.float32(p * (1 + 2e-7 * rng.standard_normal(p.shape))),
        variables['params'],
      )
      apart = np.abs(logs({**variables, 'params': moved}) - want)
      self.assertLess(apart[:at].max(), 1e-4)
      found.append(apart[at] > 1e-4)
    self.assertTrue(any(found), (name, at))
    self.assertFalse(all(found), (name, at))

  def test_the_trainer_chooses_the_same_experts(self, name='v3'):
    made, variables = built(name)
    run = Engine(made, variables, dataclasses.replace(CFG, routing=True))
    asked = [dataclasses.replace(r, max_new_tokens=200) for r in requests()[:4]]
    numbers = [run.submit(request) for request in asked]
    tokens = {number: [] for number in numbers}
    while run.busy():
      for event in run.step():
        tokens[event.request] += event.tokens
    moved = total = 0
    for request, number in zip(asked, numbers):
      row = np.array([[*request.prompt, *tokens[number]]])
      out = jax.jit(made.apply)(variables, row)
      experts = np.asarray(ds.moe_statistics(out.aux, 'experts'))[:, 0]
      # Those of the tokens that were read to draw: the prompt's last one on.
      read = experts[:, len(request.prompt) - 1 : -1]
      want = np.stack([np.bincount(e.ravel(), minlength=8) for e in read])
      moved += int(np.abs(run.expert_load(number) - want).sum() // 2)
      total += read.size
    self.assertLessEqual(moved, total // 1000)
    print(f'{name}: {moved} of {total} choices of experts differ')


if __name__ == '__main__':
  absltest.main()
