"""Measures pass@k on a task's held-out problems, through the engine.

Each problem's counts go to disk as they come: a call that was ended goes on
with those that are left.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.evaluation import estimates
from deepseek_jax.record.partial_lines import PartialLines
from deepseek_jax.rl import answering
from deepseek_jax.rl.answering import AnswerConfig, Answering, Asked, Scored
from deepseek_jax.rl.tasks import Task


def check(task: Task, where: str = 'task') -> None:
  """Raises InputError for a task that holds no problem out."""
  if not task.heldout:
    raise InputError(
      f"{where}: holds no problem out; set its 'heldout' to a share or a file"
    )


def passed(
  asked: Asked,
  task: Task,
  cfg: AnswerConfig,
  ks: Sequence[int],
  path: Path,
  *,
  limit: int | None = None,
  about: dict | None = None,
  resamples: int = 10_000,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Returns pass@k on held-out problems, and what else there is to say of them.

  An answer without an end counts as it stands. One whose verifier failed is no
  answer: its problem has fewer, and leaves pass@k where k are not left.

  Args:
    asked: the model.
    task: its verifiers decide what is right, see `rewards.is_right`.
    cfg: how answers are sampled; n of them a problem.
    ks: each k.
    path: keeps the problems that are done, see `PartialLines`.
    limit: problems at most, the first ones; None: all.
    about: what tells the model from others, in JSON.
    resamples: of the intervals.
    say: takes a line now and then.

  Raises:
    InputError: a k is more than n, or no problem is held out or has a score.
  """
  estimates.check_k(ks, cfg.n)
  check(task)
  count = min(len(task.heldout), limit or len(task.heldout))
  settings = {**answering.settings(cfg, task), **(about or {})}
  with PartialLines(path, settings) as lines:
    if len(lines.rows) < count:
      # All of them decide the shapes: a limit changes no bit of an answer.
      with Answering(asked, task, task.heldout, cfg) as answers:
        for place, scored in answers.each(len(lines.rows), count):
          lines.add(_row(task.heldout[place], scored))
          if (place + 1) % max(count // 10, 1) == 0:
            say(f'{place + 1} of {count} problems')
    rows = lines.rows[:count]
  return summary(rows, ks, resamples=resamples, seed=cfg.seed)


def _row(problem: dict, scored: Sequence[Scored]) -> dict[str, Any]:
  """Returns what stays of a problem's answers."""
  known = [one for one in scored if one.right is not None]
  return {
    'prompt': problem['prompt'],
    'scored': len(known),
    'right': sum(bool(one.right) for one in known),
    'rewards': [one.reward for one in scored],
    'tokens': [len(one.tokens) for one in scored],
    'unfinished': sum(not one.whole for one in scored),
    'errors': [one.error for one in scored if one.error is not None],
    'texts': [one.text for one in scored],
  }


def summary(
  rows: Sequence[dict], ks: Sequence[int], *, resamples: int, seed: int
) -> dict[str, Any]:
  """Returns the numbers of an evaluation from the rows of its problems.

  Args:
    rows: as `_row` makes them: 'scored' and 'right' among them.
    ks: each k.
    resamples: of the intervals.
    seed: of their draws.

  Raises:
    InputError: no problem has k scored answers.
  """
  out: dict[str, Any] = {
    'problems': len(rows),
    'interval': estimates.named(resamples),
    'pass': {},
  }
  for k in ks:
    some = [r for r in rows if r['scored'] >= k]
    if not some:
      raise InputError(
        f'pass@{k}: no problem has so many answers with a score'
        f' ({sum(len(r["errors"]) for r in rows)} verifier errors, the first:'
        f' {next((e for r in rows for e in r["errors"]), "none")!r})'
      )
    values = [estimates.pass_at_k(r['scored'], r['right'], k) for r in some]
    made = estimates.estimate(values, resamples=resamples, seed=seed)
    out['pass'][str(k)] = made | {'problems': len(some)}
  scores = [x for r in rows for x in r['rewards'] if x is not None]
  lengths = [x for r in rows for x in r['tokens']]
  return out | {
    'reward': float(np.mean(scores)) if scores else None,
    'answer_tokens': float(np.mean(lengths)),
    'unfinished': sum(r['unfinished'] for r in rows) / len(lengths),
    'verifier_errors': sum(len(r['errors']) for r in rows),
  }
