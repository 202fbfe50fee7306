"""Makes conversations of a model's right answers: rejection sampling.

R1's distillation (arXiv:2501.12948, section 2.4) and its second round of
fine-tuning learn from them: several answers to a problem are sampled, scored by
the task's verifiers, and the right ones kept.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deepseek_jax import files
from deepseek_jax.errors import InputError
from deepseek_jax.record.partial_lines import PartialLines
from deepseek_jax.rl import answering, chats
from deepseek_jax.rl.answering import AnswerConfig, Answering, Asked, Scored
from deepseek_jax.rl.tasks import Task

Keep = Literal['all', 'shortest', 'first']


class Harvest(NamedTuple):
  """Counts what became of answers.

  Attributes:
    problems: that were asked.
    answers: of all of them.
    right: that the verifiers gave full marks.
    kept: conversations that were written.
    solved: problems of which an answer was kept.
    unfinished: right or wrong, had no end at the limit; none is kept.
    repeated: right ones that were said before.
    odd: right ones that the chat would write otherwise than they were sampled.
    errors: of verifiers.
  """

  problems: int = 0
  answers: int = 0
  right: int = 0
  kept: int = 0
  solved: int = 0
  unfinished: int = 0
  repeated: int = 0
  odd: int = 0
  errors: int = 0

  def line(self) -> str:
    """Returns the counts as a line."""
    return (
      f'{self.problems} problems: {self.right} of {self.answers} answers are'
      f' right, {self.kept} are kept, of {self.solved} problems;'
      f' {self.unfinished} had no end, {self.repeated} were said before,'
      f' {self.odd} are of no form of the chat, {self.errors} verifier errors'
    )


def harvest(
  asked: Asked,
  task: Task,
  path: str | Path,
  cfg: AnswerConfig,
  *,
  keep: Keep = 'all',
  about: dict | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> Harvest:
  """Writes the right answers to a task's training problems as conversations.

  A killed call goes on with the problems that are left (`path`.partial). A file
  that is there is used again where the same call wrote it.

  Args:
    asked: the model; an answer is kept in the form of its chat.
    task: the problems; held-out ones are never asked.
    path: the .jsonl file to write, see `data.conversations`.
    cfg: how answers are sampled.
    keep: of a problem's right answers all, the shortest or the first.
    about: what tells the model from others, in JSON.
    say: takes a line now and then.

  Returns:
    What became of the answers.

  Raises:
    InputError: no answer is right, the file is of another call, or it does not
      end in .jsonl.
  """
  path = Path(path).expanduser()
  if path.suffix != '.jsonl':
    raise InputError(
      f'answers = {str(path)!r}: must end in .jsonl, by which conversations are'
      ' known'
    )
  # What neither changes an answer nor whether it is right.
  free = ('seconds', 'processes')
  fields = answering.settings(cfg, task)
  settings = {
    'tokenizer': asked.tokenizer.sha256,
    'keep': keep,
    **{name: value for name, value in fields.items() if name not in free},
    **(about or {}),
  }
  if path.exists():
    return _again(path, settings)
  partial = path.with_suffix('.partial')
  with PartialLines(partial, settings) as lines:
    if len(lines.rows) < len(task.train):
      with Answering(asked, task, task.train, cfg) as answers:
        for place, scored in answers.each(len(lines.rows)):
          lines.add(_kept(asked, task.train[place]['prompt'], scored, keep))
          if place + 1 in _marks(len(task.train)):
            say(_total(lines.rows).line())
    found = _total(lines.rows)
    if not found.kept:
      raise InputError(
        f'answers: none is kept ({found.line()}); ask for more answers, give'
        f' them more tokens, or choose easier problems ({partial} has them)'
      )
    _write(path, lines.rows, settings, found)
  partial.unlink()
  return found


def _marks(count: int) -> set[int]:
  """Returns the places at which a line is said, ten in all."""
  return {count * tenth // 10 for tenth in range(1, 11)}


def _kept(
  asked: Asked, prompt: str, scored: Sequence[Scored], keep: Keep
) -> dict[str, Any]:
  """Returns the row of a problem: its counts, and the conversations kept."""
  right = [one for one in scored if one.right and one.whole]
  chosen: dict[str, Any] = {}
  odd = 0
  order = (
    sorted(right, key=lambda one: len(one.tokens))
    if keep == 'shortest'
    else right
  )
  for one in order:
    said = chats.spoken(asked.chat, asked.tokenizer, prompt, one.tokens)
    if said is None:
      odd += 1
    elif one.text not in chosen:
      chosen[one.text] = said
  distinct = len(chosen)
  messages = list(chosen.values())[: None if keep == 'all' else 1]
  counts = Harvest(
    problems=1,
    answers=len(scored),
    right=sum(bool(one.right) for one in scored),
    kept=len(messages),
    solved=int(bool(messages)),
    unfinished=sum(not one.whole for one in scored),
    repeated=len(right) - odd - distinct,
    odd=odd,
    errors=sum(one.error is not None for one in scored),
  )
  return {'counts': list(counts), 'messages': messages}


def _total(rows: Sequence[dict]) -> Harvest:
  """Returns the counts of all problems."""
  return Harvest(*map(sum, zip(Harvest(), *(row['counts'] for row in rows))))


def _write(
  path: Path, rows: Sequence[dict], settings: dict, found: Harvest
) -> None:
  """Writes the conversations; the first says what made them all."""
  said = [messages for row in rows for messages in row['messages']]
  made = {'settings': settings, 'counts': list(found)}
  with files.whole(path) as scratch, scratch.open('w', encoding='utf-8') as out:
    for number, messages in enumerate(said):
      row = {'messages': messages, **({} if number else {'made': made})}
      out.write(json.dumps(row, ensure_ascii=False) + '\n')


def _again(path: Path, settings: dict) -> Harvest:
  """Returns the counts of a file that is there; InputError if it is another."""
  try:
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    made = json.loads(lines[0])['made']
    counts = Harvest(*made['counts'])
  except (OSError, ValueError, LookupError, TypeError):
    raise InputError(
      f'answers = {str(path)!r}: is there, and was not written by this command;'
      ' name another file'
    ) from None
  here = json.loads(json.dumps(settings))
  # Whole and right, whatever drew it: a file of earlier versions stays of use.
  new = {n: here[n] for n in ('seeds', 'verifiers') if n in here}
  there = {**new, **made['settings']}
  if there == here:
    _check_whole(path, lines, counts.kept)
    return counts
  name = next(n for n in (*here, *there) if there.get(n) != here.get(n))
  raise InputError(
    f'answers = {str(path)!r}: holds the answers of another call ({name} is'
    f' {there.get(name)!r} there, {here.get(name)!r} here); name another file'
  )


def _check_whole(path: Path, lines: Sequence[str], kept: int) -> None:
  """Raises InputError for a file that has lost some of its conversations."""
  whole = sum(line.endswith('\n') for line in lines)
  if whole != kept:
    raise InputError(
      f'answers = {str(path)!r}: holds {whole} whole lines of the {kept}'
      ' conversations that were written; bring the file back, or remove it and'
      ' they are sampled again'
    )
