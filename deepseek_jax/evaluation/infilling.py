"""Measures fill-in-the-middle: does a model write just what was cut out.

The functions of held-out documents are cut at a line, or at two characters as
in training (data.infill); the model reads what lies before and after the hole.
An answer is right if it is the text that was there, character by character.
"""

import ast
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deepseek_jax.data import infill
from deepseek_jax.data.infill import FimSplit
from deepseek_jax.errors import InputError
from deepseek_jax.evaluation import estimates, passing
from deepseek_jax.record.partial_lines import PartialLines
from deepseek_jax.rl import answering
from deepseek_jax.rl.answering import AnswerConfig, Asked

# As Python's parser counts them: a form feed ends none, unlike in splitlines.
_LINES = re.compile(r'[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+')

Span = Literal['line', 'random']


class FunctionTexts(NamedTuple):
  """Holds the functions of some documents.

  Attributes:
    texts: of each function, once.
    documents: that were read.
    unparsed: documents that are no Python, of which none comes.
  """

  texts: tuple[str, ...]
  documents: int
  unparsed: int


def functions(documents: Sequence[str], most: int = 2000) -> FunctionTexts:
  """Returns the functions at the top of Python documents and their classes.

  Args:
    documents: texts.
    most: characters of a function; longer ones are left out.
  """
  found: dict[str, None] = {}
  unparsed = 0
  for text in documents:
    try:
      tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      unparsed += 1
      continue
    lines = _LINES.findall(text)
    for node in _defined(tree):
      own = ''.join(lines[node.lineno - 1 : node.end_lineno])
      if len(own) <= most:
        found.setdefault(own)
  return FunctionTexts(tuple(found), len(documents), unparsed)


def _defined(tree: ast.Module) -> list[Any]:
  """Returns the functions of a module and of the classes at its top."""
  bodies = [tree.body] + [
    node.body for node in tree.body if isinstance(node, ast.ClassDef)
  ]
  kinds = ast.FunctionDef, ast.AsyncFunctionDef
  return [node for body in bodies for node in body if isinstance(node, kinds)]


def cut(text: str, span: Span, seed: int) -> FimSplit | None:
  """Returns a function with a hole; None if it has no place for one.

  Args:
    text: the function.
    span: 'line' takes a line behind the first, without its indent and break;
      'random' what lies between two characters, as in training.
    seed: with the text it alone decides where.
  """
  rng = random.Random(f'{seed} {text}')
  if span == 'random':
    made = infill.split(text, rng)
    return made if made.mid else None
  lines = text.splitlines(keepends=True)
  places = [i for i, line in enumerate(lines) if i and line.strip()]
  if not places:
    return None
  at = places[int(rng.random() * len(places))]
  mid = lines[at].strip()
  start = sum(map(len, lines[:at])) + lines[at].index(mid)
  return FimSplit(text[:start], mid, text[start + len(mid) :])


def check(asked: Asked, found: FunctionTexts) -> None:
  """Raises InputError where nothing can be filled in."""
  if not asked.tokenizer.fim:
    raise InputError(
      'infill: this tokenizer has no fill-in-the-middle marks; measure a model'
      ' that was trained with them'
    )
  if not found.texts:
    raise InputError(
      f'infill: no Python function is in {found.documents} documents'
      f' ({found.unparsed} are no Python); give others'
    )


def infilled(
  asked: Asked,
  found: FunctionTexts,
  cfg: AnswerConfig,
  ks: Sequence[int],
  path: Path,
  *,
  span: Span = 'line',
  limit: int | None = None,
  about: dict | None = None,
  resamples: int = 10_000,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Returns how often a hole is filled with what was there, as pass@k.

  Args:
    asked: the model; its tokenizer has fill-in-the-middle marks.
    found: the functions.
    cfg: how middles are sampled.
    ks: each k; pass@1 is the share of exact matches.
    path: keeps the functions that are done.
    span: see `cut`.
    limit: functions at most, chosen by a hash of their text; None: all.
    about: what tells the model from others, in JSON.
    resamples: of the intervals.
    say: takes a line now and then.

  Raises:
    InputError: the tokenizer has no marks, there is no function, or a k is
      more than n.
  """
  estimates.check_k(ks, cfg.n)
  check(asked, found)
  order = sorted(found.texts, key=lambda t: hashlib.sha256(t.encode()).digest())
  cuts = [made for t in order if (made := cut(t, span, cfg.seed)) is not None]
  cuts = cuts[:limit]
  if not cuts:
    raise InputError(
      f'infill: no function of {len(found.texts)} has a {span} to cut out'
    )
  prompts = [_prompt(asked, made) for made in cuts]
  settings = {
    'cuts': hashlib.sha256(json.dumps(cuts).encode()).hexdigest(),
    **answering.settings(cfg),
    **(about or {}),
  }
  with PartialLines(path, settings) as lines:
    _fill(asked, cuts, prompts, cfg, lines, say)
    rows = lines.rows
  made = passing.summary(rows, ks, resamples=resamples, seed=cfg.seed)
  del made['reward'], made['verifier_errors']
  return made | {
    'span': span,
    'documents': found.documents,
    'unparsed_documents': found.unparsed,
  }


def _prompt(asked: Asked, made: FimSplit) -> list[int]:
  """Returns what a model reads before it writes the middle."""
  encode, marks = asked.tokenizer.encode, asked.tokenizer.fim
  parts = encode(made.pre), [], encode(made.suf)
  return [*asked.begins, *infill.arrange(parts, marks)]


def _fill(
  asked: Asked,
  cuts: Sequence[FimSplit],
  prompts: Sequence[list[int]],
  cfg: AnswerConfig,
  lines: PartialLines,
  say: Callable[[str], None],
) -> None:
  """Adds the rows of the functions that are not done."""
  if len(lines.rows) == len(cuts):
    return
  stops = tuple(dict.fromkeys((asked.tokenizer.eos_id, *asked.ends)))
  engine = answering.engine_of(asked, max(map(len, prompts)), cfg)
  for places in answering.blocks(len(lines.rows), len(cuts), cfg):
    requests = [
      answering.request(prompts[p], answering.first_seed(cfg, p), stops, cfg)
      for p in places
    ]
    for place, group in zip(places, engine.run(requests)):
      texts = []
      for one in group:
        answering.check_answer(one)
        plain = [token for token in one.tokens if token not in stops]
        texts.append(asked.tokenizer.decode(plain))
      ended = [one.finish == 'stop' for one in group]
      # One that was cut may have gone on: it is no match.
      right = [e and t == cuts[place].mid for e, t in zip(ended, texts)]
      lines.add(
        {
          'middle': cuts[place].mid,
          'scored': len(group),
          'right': sum(right),
          'rewards': [float(r) for r in right],
          'tokens': [len(one.tokens) for one in group],
          'unfinished': sum(not e for e in ended),
          'errors': [],
          'texts': texts,
        }
      )
    say(f'{len(lines.rows)} of {len(cuts)} functions')
