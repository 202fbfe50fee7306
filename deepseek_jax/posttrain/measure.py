"""Measures what a model answers: greedily, and in many draws of each problem.

pass@k is the chance that one of k draws is right, estimated without bias from n
of them: 1 - C(n - c, k) / C(n, k) with c right (arXiv:2107.03374, section 2.1).
Legend: N problems, n draws of each.
"""

import collections
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.infer.engine import Engine
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.request import Answer, Request, Sampling
from deepseek_jax.model.transformer import Model
from deepseek_jax.rl.chats import ChatWriter
from deepseek_jax.rl.grading import rewards as grading
from deepseek_jax.rl.judge import Judge

KS = (1, 2, 4, 8, 16)
_QUEUE = 1 << 20  # answers that may wait


def share_solved(draws: int, right: int, k: int) -> float:
  """Returns the chance that k of the draws hold a right one."""
  if not 0 < k <= draws or not 0 <= right <= draws:
    raise ValueError(f'{right} right of {draws} draws, {k} taken')
  return 1 - math.comb(draws - right, k) / math.comb(draws, k)


def wilson(right: float, count: int) -> tuple[float, float]:
  """Returns the 95 % interval of a share, by Wilson's score.

  Args:
    right: how many of `count`.
    count: independent trials.
  """
  z, share = 1.959964, right / count
  middle = share + z * z / (2 * count)
  spread = z * math.sqrt(
    share * (1 - share) / count + z * z / (4 * count * count)
  )
  scale = 1 + z * z / count
  return max(0.0, (middle - spread) / scale), min(
    1.0, (middle + spread) / scale
  )


class Sampler:
  """Draws answers of one model's weights; its programs serve all of them."""

  def __init__(
    self,
    model: Model,
    chat: ChatWriter,
    tokenizer: Any,
    *,
    context: int,
    most: int,
    slots: int,
  ):
    """Takes the model and how prompts are written.

    Args:
      model: whose variables are given with every call.
      chat: writes prompts.
      tokenizer: reads answers.
      context: tokens of prompt and answer together.
      most: of an answer.
      slots: answers that are decoded together.
    """
    self._model, self._chat, self._tokenizer = model, chat, tokenizer
    self._most = most
    # One bucket, in which the same requests meet in every call.
    self._config = EngineConfig(
      slots=slots,
      context=context,
      page=min(64, context),
      budget=context,
      queue=_QUEUE,
      rows=(slots,),
      contexts=(context,),
    )
    self._engine: Engine | None = None

  def answers(
    self, variables: Mapping, prompts: Sequence[str], n: int, seed: int | None
  ) -> list[list[Answer]]:
    """Returns n answers of each prompt; greedy ones where seed is None."""
    if self._engine is None:
      self._engine = Engine(self._model, dict(variables), self._config)
    else:
      self._engine.load(dict(variables))
    requests = [
      Request(
        tuple(self._chat.prompt(prompt)),
        max_new_tokens=self._most,
        n=n,
        sampling=Sampling(
          temperature=0.0 if seed is None else 1.0,
          seed=0 if seed is None else (seed + n * place) % 2**63,
          stop=tuple(self._chat.ends),
        ),
      )
      for place, prompt in enumerate(prompts)
    ]
    return self._engine.run(requests)

  def prompt(self, text: str) -> list[int]:
    """Returns the tokens of a prompt."""
    return self._chat.prompt(text)

  def text(self, answer: Answer) -> str:
    """Returns an answer's text, without the token that ends it."""
    plain = [t for t in answer.tokens if t not in self._chat.ends]
    return self._tokenizer.decode(plain)


class ScoredAnswers:
  """Holds the answers to problems, and what they are worth.

  Attributes:
    texts: [N][n].
    right: [N n] bool.
    shaped: [N n] bool, whether the form is right; all True without that reward.
    lengths: [N n] tokens.
    whole: [N n] bool, ended by itself.
    errors: of verifiers.
  """

  def __init__(
    self,
    sampler: Sampler,
    drawn: Sequence[Sequence[Answer]],
    problems: Sequence[Mapping],
    rewards: Sequence[Mapping],
    seconds: float = 10.0,
  ):
    """Scores answers by the rewards of a task."""
    made = grading.read(rewards, 'rewards')
    self.texts = [[sampler.text(one) for one in group] for group in drawn]
    self.lengths = np.array([[len(a.tokens) for a in g] for g in drawn])
    self.whole = np.array([[a.finish == 'stop' for a in g] for g in drawn])
    asked = [
      (text, {**problem, 'tokens': len(one.tokens)})
      for texts, group, problem in zip(self.texts, drawn, problems)
      for text, one in zip(texts, group)
    ]
    with Judge(rewards, seconds) as judge:
      verdicts = judge(asked)
      self.errors = judge.errors
    shape = self.lengths.shape
    found = [
      v.scores is not None and grading.is_right(made, v.scores, problem)
      for v, (_, problem) in zip(verdicts, asked)
    ]
    self.right = np.reshape(found, shape)
    forms = [n for n, reward in enumerate(made) if reward.kind == 'format']
    formed = [
      v.scores is not None and all(v.scores[n] > 0 for n in forms)
      for v in verdicts
    ]
    self.shaped = np.reshape(formed, shape)


def measured(
  sampler: Sampler,
  variables: Mapping,
  problems: Sequence[Mapping],
  rewards: Sequence[Mapping],
  *,
  draws: int,
  seed: int,
  shown: int = 8,
) -> dict[str, Any]:
  """Returns what a model answers to problems, as JSON holds it.

  Args:
    sampler: of the model.
    variables: its weights.
    problems: held out; those of one 'task' and 'level' are also told apart.
    rewards: of the task.
    draws: n, of each problem, at temperature 1.
    seed: of the draws.
    shown: greedy answers of each kind that are kept as text.
  """
  prompts = [problem['prompt'] for problem in problems]
  seed = random.Random(f'measured {seed}').getrandbits(48)
  greedy = ScoredAnswers(
    sampler, sampler.answers(variables, prompts, 1, None), problems, rewards
  )
  drawn = ScoredAnswers(
    sampler, sampler.answers(variables, prompts, draws, seed), problems, rewards
  )
  places = collections.defaultdict(list)
  for place, problem in enumerate(problems):
    places[kind_of(problem)].append(place)
  every = np.arange(len(problems))
  samples = [
    {
      'prompt': prompts[place],
      'text': greedy.texts[place][0],
      'right': bool(greedy.right[place, 0]),
      'kind': kind,
    }
    for kind, some in places.items()
    for place in some[:shown]
  ]
  return {
    **_summary(greedy, drawn, every),
    'kinds': {
      kind: _summary(greedy, drawn, np.array(some))
      for kind, some in places.items()
    },
    'draws': draws,
    'samples': samples,
  }


def kind_of(problem: Mapping) -> str:
  """Returns what a problem is called: its task and level, where it has them."""
  parts = [str(problem[name]) for name in ('task', 'level') if name in problem]
  return ' '.join(parts) or 'problems'


def _summary(
  greedy: ScoredAnswers, drawn: ScoredAnswers, places: np.ndarray
) -> dict[str, Any]:
  """Returns the numbers of some problems."""
  n, count = drawn.right.shape[1], len(places)
  right = drawn.right[places].sum(axis=1)
  solved = float(greedy.right[places, 0].mean())
  return {
    'problems': count,
    'greedy': solved,
    'greedy_interval': list(wilson(solved * count, count)),
    'pass': {
      str(k): float(np.mean([share_solved(n, int(c), k) for c in right]))
      for k in KS
      if k <= n
    },
    'length': float(drawn.lengths[places].mean()),
    'in_form': float(drawn.shaped[places].mean()),
    'truncated': float(1 - drawn.whole[places].mean()),
    'verifier_errors': greedy.errors + drawn.errors,
  }
