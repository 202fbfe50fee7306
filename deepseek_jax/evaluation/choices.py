"""Measures multiple choice by log-likelihood: the likeliest choice is taken.

A file of lines {"question": "2+2 =", "choices": ["3", "4"], "answer": 1}; the
answer is a number from 0, or the text of a choice. The choice follows the
question behind `between`. Of one question all choices are compared behind the
same tokens: those that the tokens of all whole texts begin with.
Legend: R rows, S tokens of a row.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.data.conversations import json_lines
from deepseek_jax.errors import InputError
from deepseek_jax.evaluation import estimates
from deepseek_jax.model.transformer import Model
from deepseek_jax.record.partial_lines import PartialLines
from deepseek_jax.rl import log_probs
from deepseek_jax.rl.answering import Asked

_ROWS = 8
_BLOCK = 64  # questions that are scored before they are written
_LEAST = 32  # tokens of the shortest row's shape


class Question(NamedTuple):
  """Holds a question, its choices, and which of them is right."""

  text: str
  choices: tuple[str, ...]
  answer: int
  where: str


def read(path: str) -> tuple[Question, ...]:
  """Returns the questions of a file; InputError names the line at fault."""
  found = tuple(_question(row, where) for where, row in json_lines(path))
  if not found:
    raise InputError(f'{path}: holds no question')
  return found


def _question(row: Any, where: str) -> Question:
  """Returns the question of a line."""
  fields = ('question', 'choices', 'answer')
  if not isinstance(row, Mapping):
    raise InputError(f'{where}: must be an object with {", ".join(fields)}')
  for name in fields:
    if name not in row:
      raise InputError(f'{where}: {name!r} is missing')
  text, choices, answer = (row[name] for name in fields)
  if not isinstance(text, str):
    raise InputError(f'{where}: question = {text!r}: must be text')
  if not isinstance(choices, list) or len(choices) < 2:
    raise InputError(f'{where}: choices must be a list of at least two texts')
  for number, choice in enumerate(choices):
    if not isinstance(choice, str) or not choice:
      raise InputError(
        f'{where}: choices[{number}] = {choice!r}: must be text, not empty'
      )
    if choices.index(choice) != number:
      raise InputError(f'{where}: choices[{number}] = {choice!r}: stands twice')
  if isinstance(answer, str):
    if answer not in choices:
      raise InputError(f'{where}: answer = {answer!r}: is none of the choices')
    answer = choices.index(answer)
  whole = isinstance(answer, int) and not isinstance(answer, bool)
  if not whole or not 0 <= answer < len(choices):
    raise InputError(
      f'{where}: answer = {answer!r}: must be the text of a choice, or its'
      f' number from 0 to {len(choices) - 1}'
    )
  for part in (text, *choices):
    try:
      part.encode()
    except UnicodeEncodeError:
      raise InputError(f'{where}: {part[:40]!r} is no valid Unicode') from None
  return Question(text, tuple(choices), answer, where)


class ChoiceTokens(NamedTuple):
  """Holds the tokens of a question with a choice.

  Attributes:
    tokens: of both.
    start: the first that is scored.
  """

  tokens: list[int]
  start: int


def rows_of(
  asked: Asked, question: Question, between: str
) -> list[ChoiceTokens]:
  """Returns a row for each choice; all are scored from the same token on.

  Raises:
    InputError: nothing stands before a choice, or nothing tells two apart.
  """
  encode = asked.tokenizer.encode
  begin = list(asked.begins) or [asked.tokenizer.eos_id]  # starts a document
  alone = [*begin, *encode(question.text)]
  whole = [
    [*begin, *encode(f'{question.text}{between}{choice}')]
    for choice in question.choices
  ]
  # Tokens may join the two: then all are scored from before that one.
  start = min(_common(alone, ids) for ids in whole)
  return [ChoiceTokens(ids, start) for ids in whole]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns how many tokens two rows begin with alike, not all of b."""
  alike = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
  return min(next(alike, min(len(a), len(b))), len(b) - 1)


def chosen(
  asked: Asked,
  questions: Sequence[Question],
  path: Path,
  *,
  between: str = ' ',
  about: dict | None = None,
  resamples: int = 10_000,
  seed: int = 0,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Returns the accuracy of a model; of equal scores the first is taken.

  Args:
    asked: the model.
    questions: as `read` returns them.
    path: keeps the scores of every question, see `PartialLines`.
    between: stands between a question and a choice.
    about: what tells the model from others, in JSON.
    resamples: of the intervals.
    seed: of their draws.
    say: takes a line now and then.

  Returns:
    'accuracy' by the log-likelihood of a choice, 'accuracy_by_bytes' by that
    over its UTF-8 bytes, 'chance', and what they are of.
  """
  text = json.dumps([list(q[:3]) for q in questions])
  of = {
    'questions': len(questions),
    'sha256': hashlib.sha256(text.encode()).hexdigest(),
    'between': between,
  }
  run = _scorer(asked.model)
  with PartialLines(path, {**of, **(about or {})}) as lines:
    for start in range(len(lines.rows), len(questions), _BLOCK):
      some = questions[start : start + _BLOCK]
      for row in _scored(run, asked, some, between):
        lines.add(row)
      say(f'{len(lines.rows)} of {len(questions)} questions')
    rows = lines.rows
  right = lambda name: estimates.estimate(
    [float(r[name] == r['answer']) for r in rows],
    resamples=resamples,
    seed=seed,
  )
  sizes = [len(r['log_likelihoods']) for r in rows]
  return of | {
    'accuracy': right('chosen'),
    'accuracy_by_bytes': right('chosen_by_bytes'),
    'chance': float(np.mean([1 / size for size in sizes])),
    'interval': estimates.named(resamples),
  }


def _scored(
  run: Callable, asked: Asked, questions: Sequence[Question], between: str
) -> list[dict[str, Any]]:
  """Returns a row of scores for each question."""
  made = [rows_of(asked, question, between) for question in questions]
  flat = [row for rows in made for row in rows]
  scores = iter(log_likelihoods(run, asked.variables, flat))
  out = []
  for question, rows in zip(questions, made):
    said = [next(scores) for _ in rows]
    if not np.isfinite(said).all():
      raise InputError(
        f'{question.where}: the log-likelihoods are {said}: the model gives no'
        ' finite logits for this question; measure sound weights'
      )
    by_bytes = [s / len(c.encode()) for s, c in zip(said, question.choices)]
    out.append(
      {
        'where': question.where,
        'answer': question.answer,
        'log_likelihoods': said,
        'chosen': int(np.argmax(said)),
        'chosen_by_bytes': int(np.argmax(by_bytes)),
      }
    )
  return out


def log_likelihoods(
  run: Callable, variables: dict, rows: Sequence[ChoiceTokens]
) -> list[float]:
  """Returns the sum of the log-probs of each row's scored tokens, in nats.

  Rows of like length are computed together, in shapes that grow by doubling.

  Args:
    run: as `_scorer` makes it.
    variables: of the model.
    rows: at least one token is scored of each.
  """
  order = sorted(range(len(rows)), key=lambda n: len(rows[n].tokens))
  out = [0.0] * len(rows)
  for start in range(0, len(order), _ROWS):
    some = order[start : start + _ROWS]
    longest = max(len(rows[n].tokens) for n in some)
    batch = _batch([rows[n] for n in some], _shape(longest))
    found = np.asarray(run(variables, batch), np.float64).sum(axis=1)
    for n, value in zip(some, found):
      out[n] = float(value)
  return out


def _shape(longest: int) -> int:
  """Returns the tokens of rows that hold so many."""
  size = _LEAST
  while size < longest:
    size *= 2
  return size


def _batch(rows: Sequence[ChoiceTokens], size: int) -> dict[str, np.ndarray]:
  """Returns rows as arrays [R S+1]; rows beyond those given are padding."""
  out = {
    'tokens': np.zeros((_ROWS, size + 1), np.int32),
    'segments': np.zeros((_ROWS, size + 1), np.int32),
    'scored': np.zeros((_ROWS, size + 1), np.float32),
  }
  for i, row in enumerate(rows):
    end = len(row.tokens)
    out['tokens'][i, :end] = row.tokens
    out['segments'][i, :end] = 1
    out['scored'][i, row.start : end] = 1
  return out


def _scorer(model: Model) -> Callable[[dict, dict], jax.Array]:
  """Returns (variables, batch) -> log-probs [R S], 0 where none is scored."""

  def run(variables: dict, batch: dict[str, jax.Array]) -> jax.Array:
    out = model.apply(
      variables,
      batch['tokens'][:, :-1],
      segment_ids=batch['segments'][:, :-1],
    )
    return log_probs.sampled(
      out.hidden,
      model.head(variables),
      batch['tokens'][:, 1:],
      batch['scored'][:, 1:],
    )[0]

  return jax.jit(run)
