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
    """Checks that answers are equal up to a near-tie, and counts those."""
    ties, compared, worst = 0, 0, 0.0
    for (a,), (b,) in zip(first, second):
      differ = [i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y]
      end = differ[0] if differ else NEW
      if differ:
        self.assertLess(gap(a, end), 1e-5)
        ties += 1
      compared += end
      logs = lambda answer, n=end: np.array(
        [p.logprob for p in answer.logprobs[:n]]
      )
      worst = max(worst, float(np.abs(logs(a) - logs(b)).max(initial=0)))
    self.assertLess(worst, 1e-4)
    print(
      f'{name}, {what}: {compared} tokens compared, {ties} near-ties, largest'
      f' difference of a log-probability {worst:.1e}'
    )

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
