"""Measures a finished run or a Hugging Face folder, into results.json.

    python -m experiments.evaluate --workdir=runs/rl --task=task.json --n=16 \\
      --k=1 --k=16
    python -m experiments.evaluate --workdir=runs/v3 --bits --infill=heldout
    python -m experiments.evaluate --hf=DIR --choices=quiz.jsonl --out=measured

pass@k on a task's held-out problems, exact fill-in-the-middle of functions,
multiple choice by log-likelihood (lines with question, choices, answer), bits
per byte of held-out text. Each is written when it is there, its answers before
that, in evaluations/; started again, the same command goes on with what is
left, to the same numbers.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from deepseek_jax import say
from deepseek_jax.cli import common, experiment_file
from deepseek_jax.cli.opened import Opened, load
from deepseek_jax.errors import InputError
from deepseek_jax.evaluation import (
  choices,
  entries,
  estimates,
  heldout_bits,
  infilling,
  passing,
)
from deepseek_jax.infer import checks
from deepseek_jax.record import results
from deepseek_jax.rl import answering, tasks
from deepseek_jax.rl.answering import AnswerConfig, Asked
from deepseek_jax.rl.chats import ChatConfig

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run.')
_CONFIG = experiment_file.define_flag()
flags.declare_key_flag('config')
_HF = flags.DEFINE_string('hf', None, 'Hugging Face folder, or one converted.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'What to compute in (--hf).'
)
_OUT = flags.DEFINE_string(
  'out', None, 'Folder of results.json; None: that of the run.'
)
_TASK = flags.DEFINE_multi_string(
  'task', [], 'Task whose held-out problems are answered, for pass@k.'
)
_INFILL = flags.DEFINE_string(
  'infill', None, "Text to cut functions of: a path, or 'heldout' of the run."
)
_SPAN = flags.DEFINE_enum(
  'span', 'line', ['line', 'random'], 'What --infill cuts out.'
)
_CHOICES = flags.DEFINE_multi_string(
  'choices', [], 'File of lines with question, choices and answer.'
)
_BETWEEN = flags.DEFINE_string(
  'between', ' ', 'Stands between a question and a choice.'
)
_BITS = flags.DEFINE_bool(
  'bits', False, "Bits per byte of the run's held-out data, as it trains."
)
_TEXT = flags.DEFINE_multi_string(
  'text', [], 'Text to measure the bits per byte of, all of it.'
)
_LENGTH = flags.DEFINE_integer(
  'seq_len', 256, 'Tokens that --text is read in; a run has its own.'
)
_N = flags.DEFINE_integer('n', 1, 'Answers of each problem or function.')
_K = flags.DEFINE_multi_integer('k', [1], 'Of pass@k; at most --n.')
_NEW = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens of an answer.')
_TEMPERATURE = flags.DEFINE_float(
  'temperature', None, '0: the likeliest; None: 1, and 0 of one answer.'
)
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among this much probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of draws, holes and intervals.')
_SLOTS = flags.DEFINE_integer('slots', 32, 'Answers that are made together.')
_LIMIT = flags.DEFINE_integer(
  'limit', None, 'Problems, functions or questions at most; None: all.'
)
_RESAMPLES = flags.DEFINE_integer(
  'resamples', 10_000, 'Bootstrap resamples of the intervals.'
)
_FORMAT = flags.DEFINE_string(
  'chat_format',
  None,
  'How problems are asked: plain, r1_zero, template, v3, r1, v32, v4, v41;'
  ' None: as the run was trained, or as the folder has a template.',
)

Job = tuple[str, str, Callable[[], dict[str, Any]]]  # what, of what, measured


def _chat(source: Opened) -> ChatConfig:
  """Returns how problems are asked."""
  if _FORMAT.value is None:
    return source.chat()
  folder = source.folder if _FORMAT.value == 'template' else ''
  return ChatConfig(_FORMAT.value, folder)


def _answers() -> AnswerConfig:
  """Returns how answers are sampled."""
  warm = _TEMPERATURE.value
  if warm is None:
    warm = 1.0 if _N.value > 1 else 0.0
  return AnswerConfig(
    n=_N.value,
    most=_NEW.value,
    temperature=warm,
    top_p=_TOP_P.value,
    seed=_SEED.value,
    slots=_SLOTS.value,
  )


class _Measuring:
  """Holds the model and where its numbers go."""

  def __init__(self, source: Opened, out: Path, cfg: AnswerConfig):
    """Makes what all evaluations share."""
    self.source, self.out, self.cfg = source, out, cfg
    checks.check_text(source.tokenizer, source.model)
    chat = _chat(source)
    around = source.boundaries
    self.asked = Asked(
      source.model,
      source.variables,
      source.tokenizer,
      chat.build(source.tokenizer),
      around.begins,
      around.ends,
    )
    self.about = {
      'model': source.sha256,
      'step': source.step,
      'dtype': source.model.config.compute.products,
    }
    self.form = {'chat': chat.format}
    self.sampled = dataclasses.asdict(cfg)
    for name in ('slots', 'seconds', 'processes'):
      del self.sampled[name]

  def rows(self, what: str, source: str, *of: Any) -> Path:
    """Returns the file of an evaluation's answers, by all that decides them."""
    text = json.dumps([what, self.about, *of], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    stem = Path(source).stem or what
    return self.out / 'evaluations' / f'{what}-{stem}-{digest}.jsonl'

  def jobs(self) -> list[Job]:
    """Returns what the flags ask for; wrong input is found here."""
    out: list[Job] = []
    if _BITS.value:
      held = heldout_bits.of_run(self.source)
      measure = lambda: heldout_bits.measured(self.source, held)
      out.append(('bits per byte', 'heldout', measure))
    for path in _TEXT.value:
      out.append(self._text(path))
    for path in _CHOICES.value:
      out.append(self._choices(path))
    for path in _TASK.value:
      out.append(self._task(path))
    if _INFILL.value:
      out.append(self._infill(_INFILL.value))
    if not out:
      raise InputError(
        'nothing to measure: give --task, --infill, --choices, --text or --bits'
      )
    return out

  def _text(self, path: str) -> Job:
    """Returns the measurement of a text's bits per byte."""
    held = heldout_bits.of_text(self.source, path, _LENGTH.value)
    return (
      'bits per byte',
      path,
      lambda: heldout_bits.measured(self.source, held),
    )

  def _choices(self, path: str) -> Job:
    """Returns the measurement of multiple choice."""
    questions = choices.read(path)[: _LIMIT.value]
    rows = self.rows('choices', path, list(questions), _BETWEEN.value)
    measure = lambda: choices.chosen(
      self.asked,
      questions,
      rows,
      between=_BETWEEN.value,
      about=self.about,
      resamples=_RESAMPLES.value,
      seed=_SEED.value,
      say=say.warn,
    )
    return 'choices', path, measure

  def _task(self, path: str) -> Job:
    """Returns the measurement of pass@k on a task."""
    task = tasks.read(path)
    passing.check(task, path)
    of = self.form, answering.settings(self.cfg, task)
    rows = self.rows('pass', path, *of)

    def measure() -> dict[str, Any]:
      found = passing.passed(
        self.asked,
        task,
        self.cfg,
        _K.value,
        rows,
        limit=_LIMIT.value,
        about=self.about | self.form,
        resamples=_RESAMPLES.value,
        say=say.warn,
      )
      return {'sha256': task.sha256} | self.form | self.sampled | found

    return 'pass@k', path, measure

  def _infill(self, path: str) -> Job:
    """Returns the measurement of fill-in-the-middle."""
    texts = heldout_bits.texts(self.source, path)
    found = infilling.functions(texts)
    of = hashlib.sha256(json.dumps(found).encode()).hexdigest(), _SPAN.value
    of = (*of, answering.settings(self.cfg), _LIMIT.value)
    rows = self.rows('infill', path, *of)
    infilling.check(self.asked, found)

    def measure() -> dict[str, Any]:
      made = infilling.infilled(
        self.asked,
        found,
        self.cfg,
        _K.value,
        rows,
        span=_SPAN.value,
        limit=_LIMIT.value,
        about=self.about,
        resamples=_RESAMPLES.value,
        say=say.warn,
      )
      return self.sampled | made

    return 'infill', path, measure


def _check_flags() -> AnswerConfig:
  """Returns how answers are sampled; InputError for wrong flags."""
  cfg = _answers()
  estimates.check_k(_K.value, cfg.n)
  for name, flag in (('limit', _LIMIT), ('resamples', _RESAMPLES)):
    if flag.value is not None and flag.value < 1:
      raise InputError(f'--{name}={flag.value}: must be at least 1')
  if _HF.value and not _OUT.value:
    raise InputError(
      '--out is missing: results of a Hugging Face folder are not written into'
      ' it; name a folder of their own'
    )
  return cfg


def main(argv: list[str]) -> None:
  """Measures, writes and prints."""
  del argv
  cfg = _check_flags()
  experiment_file.load_flag(_CONFIG)
  source = load(_WORKDIR.value, _HF.value, _DTYPE.value)
  out = Path(os.path.expanduser(_OUT.value or source.folder))
  measuring = _Measuring(source, out, cfg)
  measured = []
  for what, of, measure in measuring.jobs():
    about = measuring.about | {'versions': results.versions()}
    entry = {'what': what, 'source': of, **about, **measure()}
    path = entries.add(out, entry)
    measured.append(entry)
  console = Console()
  console.print(entries.table(measured))
  for entry in measured:
    for line in entries.notes(entry):
      console.print(line, markup=False, highlight=False)
  console.print(f'results: {path.absolute()}', soft_wrap=True)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
