"""Reads tasks: problems to answer, how answers are scored, what is held out.

A task is a file of JSON:

    {"problems": "sums.jsonl",
     "rewards": [{"kind": "exact", "place": "all"}],
     "heldout": 0.1}

A reward with "only": "numbers" scores the problems alone that have this field:
so a task mixes kinds. 'problems' is a file of lines
{"prompt": "1+2=", "answer": "3"} beside it, or
{"maker": "addition", "count": 2000, "digits": 2}. 'heldout' is a share, chosen
by a hash of the prompt, or another file; prompts never stand on both sides.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.rl import makers
from deepseek_jax.rl.grading import rewards

_FIELDS = ('problems', 'rewards', 'heldout', 'form')


@dataclasses.dataclass(frozen=True)
class Task:
  """Holds a task.

  Attributes:
    train, heldout: problems, each with a 'prompt' and what verifiers need.
    rewards: as `judge.Judge` takes them.
    sha256: of problems and rewards as the files have them.
    verifiers: SHA-256 of the code of one's own rewards; '' without any.
  """

  train: tuple[dict, ...]
  heldout: tuple[dict, ...]
  rewards: tuple[dict, ...]
  sha256: str
  verifiers: str = ''


def read(path: str) -> Task:
  """Returns the task of a file.

  Raises:
    InputError: names the file, line and field that is wrong.
  """
  path = os.path.expanduser(path)
  spec = _object(path)
  for name in spec:
    if name not in _FIELDS:
      raise InputError(f'{path}: {name}: no such field; has {list(_FIELDS)}')
  for name in ('problems', 'rewards'):
    if name not in spec:
      raise InputError(f'{path}: {name} is missing')
  made = rewards.read(spec['rewards'], path)
  form = spec.get('form', '{}')
  if not isinstance(form, str) or '{}' not in form:
    raise InputError(f'{path}: form = {form!r}: must be text that holds {{}}')
  problems = _problems(spec['problems'], path, made, form)
  share = spec.get('heldout', 0.1)
  if isinstance(share, str):
    train, heldout = problems, _problems(share, path, made, form)
    _check_apart(train, heldout, path)
  else:
    train, heldout = _split(problems, share, path)
  _check_only(made, [*train, *heldout], path)
  if not train:
    raise InputError(f'{path}: heldout = {share!r} leaves nothing to train on')
  text = json.dumps([train, heldout, spec['rewards']], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return Task(
    tuple(train),
    tuple(heldout),
    tuple(spec['rewards']),
    digest,
    _code_sha256(spec['rewards']),
  )


def _code_sha256(given: list[dict]) -> str:
  """Returns the SHA-256 of the files of `own` rewards; '' without any."""
  digest = hashlib.sha256()
  paths = [one['file'] for one in given if one['kind'] == 'own']
  for path in paths:
    try:
      with open(os.path.expanduser(path), 'rb') as file:
        code = file.read()
    except OSError as error:
      raise InputError(f'{path}: cannot be read ({error.strerror})') from error
    digest.update(len(code).to_bytes(8, 'big') + code)
  return digest.hexdigest() if paths else ''


def _parsed(text: str) -> Any:
  """Returns the value of JSON; ValueError also for NaN and for a name twice."""

  def pairs(items: list[tuple[str, Any]]) -> dict:
    names = [name for name, _ in items]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
      raise ValueError(f'{twice[0]!r} stands twice')
    return dict(items)

  def constant(name: str) -> None:
    raise ValueError(f'{name} is no number of JSON')

  return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)


def _object(path: str) -> dict:
  """Returns the JSON object in a file."""
  try:
    with open(path, encoding='utf-8-sig') as file:
      spec = _parsed(file.read())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path}: is no file of JSON ({error})') from None
  if not isinstance(spec, dict):
    raise InputError(f'{path}: must hold a JSON object')
  return spec


def _problems(
  source: Any, path: str, made: tuple[rewards.Reward, ...], form: str
) -> list[dict]:
  """Returns the problems of a file of lines or of a maker, all checked."""
  if isinstance(source, Mapping):
    found = [(path, p) for p in makers.problems(dict(source), path)]
  elif isinstance(source, str):
    folder = os.path.dirname(path)
    found = _lines(os.path.join(folder, os.path.expanduser(source)))
  else:
    raise InputError(f'{path}: problems must be a file or {{"maker": ...}}')
  for where, problem in found:
    prompt = problem.get('prompt')
    if not isinstance(prompt, str) or not prompt:
      raise InputError(f"{where}: 'prompt' = {prompt!r}: must be text")
    rewards.check(made, problem, where)
  if not found:
    raise InputError(f'{path}: problems = {source!r}: holds no problem')
  # A place in the prompt is not read as one of the form.
  return [{**p, 'prompt': form.replace('{}', p['prompt'])} for _, p in found]


def _lines(path: str) -> list[tuple[str, dict]]:
  """Returns (place, problem) of the lines of a file that are not blank."""
  out = []
  try:
    with open(path, encoding='utf-8-sig') as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          where = f'{path} line {number}'
          out.append((where, _problem(line, where)))
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path}: cannot be read ({error})') from None
  return out


def _problem(line: str, where: str) -> dict:
  """Returns the JSON object of a line."""
  try:
    value = _parsed(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: is not JSON ({error})') from None
  if not isinstance(value, dict):
    raise InputError(f'{where}: must be an object with a prompt')
  return value


def _split(
  problems: list[dict], share: Any, path: str
) -> tuple[list[dict], list[dict]]:
  """Returns (train, heldout) by a hash: one prompt is always on one side."""
  number = isinstance(share, int | float) and not isinstance(share, bool)
  if not number or not 0 <= share < 1:
    raise InputError(
      f'{path}: heldout = {share!r}: must be a share from 0 to below 1, or a'
      ' file'
    )
  # Prompts that differ in spaces alone go where the first in order goes.
  named: dict[str, str] = {}
  for problem in problems:
    prompt, key = problem['prompt'], _key(problem)
    named[key] = min(prompt, named.get(key, prompt))
  sides: tuple[list, list] = [], []
  for problem in problems:
    digest = hashlib.sha256(named[_key(problem)].encode()).digest()
    sides[int.from_bytes(digest[:7], 'big') < share * 2**56].append(problem)
  return sides


def _check_only(
  made: tuple[rewards.Reward, ...], problems: list[dict], path: str
) -> None:
  """Raises InputError for a reward that is for problems that are not there."""
  for number, reward in enumerate(made):
    if not any(reward.applies(problem) for problem in problems):
      raise InputError(
        f'{path}: rewards[{number}].only = {reward.only!r}: no problem has this'
        ' field, so it would score none'
      )


def _check_apart(train: list[dict], heldout: list[dict], path: str) -> None:
  """Raises InputError for a prompt that is trained on and held out."""
  known = {_key(p) for p in train}
  both = [p['prompt'] for p in heldout if _key(p) in known]
  if both:
    raise InputError(
      f'{path}: {len(both)} prompts are trained on and held out, the first is'
      f' {both[0][:80]!r}; take them out of one file'
    )


def _key(problem: Mapping) -> str:
  """Returns a prompt without what does not tell it from others."""
  return ' '.join(problem['prompt'].split())
