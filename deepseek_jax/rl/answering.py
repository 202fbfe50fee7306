"""Asks a model the problems of a task, many times each, and scores the answers.

For rejection sampling and for evaluation: weights stay as they are. The engine
computes in one shape and seeds depend on a problem's place alone, so answers
are the same however many problems are asked together.
Legend: n answers of a problem.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from deepseek_jax.config import above, at_least, within
from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.engine import Engine
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.request import Answer, Request, Sampling
from deepseek_jax.model.transformer import Model
from deepseek_jax.rl.chats import ChatWriter
from deepseek_jax.rl.grading import rewards
from deepseek_jax.rl.judge import Judge
from deepseek_jax.rl.tasks import Task

_SEEDS = 2**63  # what a seed wraps around at


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
  """Describes how answers are sampled and scored.

  Attributes:
    n: answers of a problem.
    most: tokens of an answer.
    temperature: 0 takes the likeliest tokens, so n is 1.
    top_p: draws among the likeliest tokens that make up this probability.
    seed: with a problem's place and an answer's number it alone decides what is
      drawn; two seeds share no answer.
    slots: answers that are decoded together.
    seconds: by the clock, that a verifier may take for an answer.
    processes: of verifiers.
  """

  n: int = 4
  most: int = 128
  temperature: float = 1.0
  top_p: float = 1.0
  seed: int = 0
  slots: int = 64
  seconds: float = 10.0
  processes: int = 1

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, 'answers.', n=1, most=1, slots=1, processes=1)
    at_least(self, 'answers.', temperature=0, seed=0)
    above(self, 'answers.', seconds=0)
    within(self, 'answers.', ends='(]', top_p=(0, 1))
    if self.temperature == 0 and self.n > 1:
      raise InputError(
        f'answers.n = {self.n}: at answers.temperature = 0 all answers of a'
        ' problem are equal; set n to 1, or a temperature above 0'
      )


class Asked(NamedTuple):
  """Describes who is asked, and how.

  Attributes:
    model, variables: the model.
    tokenizer: of the model.
    chat: how prompts are written.
    begins: tokens before every prompt, see `data.boundaries`.
    ends: tokens that end an answer.
  """

  model: Model
  variables: dict
  tokenizer: Tokenizer | ByteTokenizer
  chat: ChatWriter
  begins: tuple[int, ...] = ()
  ends: tuple[int, ...] = ()

  def prompt(self, text: str) -> list[int]:
    """Returns the tokens of a question."""
    ids = list(self.chat.prompt(text))
    begun = tuple(ids[: len(self.begins)]) == self.begins
    return ids if begun else [*self.begins, *ids]

  def stops(self) -> tuple[int, ...]:
    """Returns the tokens that end an answer; InputError without any."""
    found = tuple(dict.fromkeys((*self.chat.ends, *self.ends)))
    if not found:
      raise InputError(
        'chat: has no token that ends a turn, so no answer would end; use a'
        ' chat format, or a tokenizer, that has one'
      )
    return found


class Scored(NamedTuple):
  """Holds an answer and its score.

  Attributes:
    tokens: the end token with them.
    text: without it.
    whole: ended by itself, not at the limit.
    reward: None where a verifier failed.
    right: see `grading.rewards.is_right`; None where a verifier failed.
    error: of the verifier.
  """

  tokens: tuple[int, ...]
  text: str
  whole: bool
  reward: float | None
  right: bool | None
  error: str | None = None


class Answering:
  """Answers problems with one engine and one judge.

  Attributes:
    problems: all that may be asked.
    prompts: their tokens.
  """

  def __init__(
    self,
    asked: Asked,
    task: Task,
    problems: Sequence[dict],
    cfg: AnswerConfig,
  ):
    """Starts the engine and the verifiers' processes.

    Args:
      asked: the model.
      task: whose rewards score answers.
      problems: all that will be answered: their longest decides the shapes.
      cfg: see there.

    Raises:
      InputError: there is no problem, or the chat ends no turn.
    """
    if not problems:
      raise InputError('problems: there are none to answer')
    self.asked, self.cfg, self.problems = asked, cfg, tuple(problems)
    self._stops = asked.stops()
    self._rewards = rewards.read(task.rewards, 'rewards')
    self.prompts = [asked.prompt(p['prompt']) for p in problems]
    self._engine = engine_of(asked, max(map(len, self.prompts)), cfg)
    self._judge = Judge(task.rewards, cfg.seconds, cfg.processes)

  def each(
    self, first: int = 0, end: int | None = None
  ) -> Iterator[tuple[int, list[Scored]]]:
    """Yields (place, its n answers) of the problems from `first` to `end`.

    As many problems are asked together as fill the slots; None: to the last.
    """
    end = len(self.problems) if end is None else end
    for places in blocks(first, end, self.cfg):
      seed = first_seed(self.cfg, places[0])
      yield from zip(places, self.ask(places, self.cfg, seed))

  def ask(
    self, places: Sequence[int], cfg: AnswerConfig, seed: int
  ) -> list[list[Scored]]:
    """Returns the answers to the problems of some places.

    Args:
      places: numbers of problems.
      cfg: how they are sampled; with no more tokens than the own one's.
      seed: of the first answer to the first of them; the others follow.
    """
    requests = [
      request(self.prompts[place], seed + cfg.n * i, self._stops, cfg)
      for i, place in enumerate(places)
    ]
    return self._scored(places, self._engine.run(requests))

  def load(self, variables: dict) -> None:
    """Takes other weights of the same model."""
    self._engine.load(variables)

  def _scored(
    self, places: Sequence[int], answers: Sequence[Sequence[Answer]]
  ) -> list[list[Scored]]:
    """Returns the answers of some problems, with their scores."""
    pairs = []
    for place, group in zip(places, answers):
      problem = self.problems[place]
      for one in group:
        check_answer(one)
        text = self._text(one.tokens)
        pairs.append((text, {**problem, 'tokens': len(one.tokens)}))
    verdicts = iter(self._judge(pairs))
    texts = iter(text for text, _ in pairs)
    return [
      [
        self._one(one, self.problems[place], next(texts), next(verdicts))
        for one in group
      ]
      for place, group in zip(places, answers)
    ]

  def _one(
    self, answer: Answer, problem: dict, text: str, verdict: Any
  ) -> Scored:
    """Returns one answer with its score."""
    whole = answer.finish == 'stop'
    if verdict.scores is None:
      return Scored(answer.tokens, text, whole, None, None, verdict.error)
    right = rewards.is_right(self._rewards, verdict.scores, problem)
    return Scored(answer.tokens, text, whole, verdict.reward, right)

  def _text(self, tokens: Sequence[int]) -> str:
    """Returns an answer's text, without the token that ends it."""
    plain = [token for token in tokens if token not in self._stops]
    return self.asked.tokenizer.decode(plain)

  def close(self) -> None:
    """Ends the verifiers' processes."""
    self._judge.close()

  def __enter__(self) -> 'Answering':
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Ends the verifiers' processes."""
    self.close()


def engine_of(asked: Asked, longest: int, cfg: AnswerConfig) -> Engine:
  """Returns an engine of one shape for prompts of `longest` tokens at most."""
  context = longest + cfg.most
  shape = EngineConfig(
    slots=cfg.slots,
    context=context,
    page=min(64, context),
    budget=min(256, context),
    queue=max(cfg.n, 256),  # more of them wait
    deterministic=True,
  )
  return Engine(asked.model, asked.variables, shape)


def settings(cfg: AnswerConfig, task: Task | None = None) -> dict[str, Any]:
  """Returns what decides answers and, of a task, their scores.

  Earlier versions drew answer i of a problem by seed + i: what they began can
  not go on.
  """
  out = {**dataclasses.asdict(cfg), 'seeds': 'hashed'}
  if task is None:
    return out
  # Code changes more often than problems: scores of other code are stale.
  code = {'verifiers': task.verifiers} if task.verifiers else {}
  return {'task': task.sha256, **code, **out}


def first_seed(cfg: AnswerConfig, place: int) -> int:
  """Returns the seed of the first answer to the problem at a place.

  Seeds of answers are neighbours, so those of two `cfg.seed` lie far apart:
  else seed 1 would draw all but one of the answers of seed 0.
  """
  digest = hashlib.sha256(f'answers {cfg.seed}'.encode()).digest()
  return int.from_bytes(digest[:7], 'big') + cfg.n * place


def blocks(first: int, end: int, cfg: AnswerConfig) -> list[range]:
  """Returns the places from `first` to `end`, in parts that fill the slots."""
  size = max(4 * cfg.slots // cfg.n, 1)
  return [range(i, min(i + size, end)) for i in range(first, end, size)]


def request(
  prompt: Sequence[int], seed: int, stops: tuple[int, ...], cfg: AnswerConfig
) -> Request:
  """Returns the request for n answers, of which the first is drawn by `seed`.

  Seeds of a problem are neighbours: problems lie n apart.
  """
  return Request(
    tuple(prompt),
    max_new_tokens=cfg.most,
    n=cfg.n,
    sampling=Sampling(
      temperature=cfg.temperature,
      top_p=cfg.top_p,
      seed=seed % _SEEDS,
      stop=stops,
    ),
  )


def check_answer(answer: Answer) -> None:
  """Raises InputError for an answer that the engine could not make."""
  if answer.finish == 'error':
    raise InputError(f'an answer could not be sampled: {answer.error}')
