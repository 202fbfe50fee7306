"""Adds evaluations to results.json, each when it is there.

They are a list under 'evaluations', beside what a run reached: none is ever
replaced, and training on keeps them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from deepseek_jax.errors import InputError
from deepseek_jax.record import results


def add(folder: Path, entry: Mapping[str, Any]) -> Path:
  """Appends an evaluation to a folder's results.json; returns its path.

  An equal one that is there is not written twice.

  Raises:
    InputError: the file holds no JSON object.
  """
  folder.mkdir(parents=True, exist_ok=True)
  there = results.whole(folder)
  known = there.get(results.EVALUATIONS, [])
  if not isinstance(known, list):
    raise InputError(
      f'{folder / results.FILE}: {results.EVALUATIONS} is no list; put the file'
      ' back as it was written'
    )
  plain = results.plain(entry)
  if plain not in known:
    known = [*known, plain]
  return results.write(folder, {**there, results.EVALUATIONS: known})


def table(entries: Sequence[Mapping[str, Any]]) -> Table:
  """Returns evaluations as a table, a number a row."""
  out = Table(title='evaluations')
  for name in ('what', 'of', 'measure'):
    out.add_column(name)
  for name in ('value', 'interval', 'over'):
    out.add_column(name, justify='right')
  for entry in entries:
    for measure, value, interval, over in numbers(entry):
      spread = '' if interval is None else '{:.3f} .. {:.3f}'.format(*interval)
      row = entry['what'], entry['source'], measure, f'{value:.4f}', spread
      out.add_row(*row, over)
  return out


def numbers(
  entry: Mapping[str, Any],
) -> list[tuple[str, float, list[float] | None, str]]:
  """Returns (measure, value, interval, what it is a mean of) of an entry."""
  out = []
  for k, made in entry.get('pass', {}).items():
    over = f'{made["problems"]} problems'
    out.append((f'pass@{k}', made['value'], made['interval'], over))
  for name in ('accuracy', 'accuracy_by_bytes'):
    if name in entry:
      made, over = entry[name], f'{entry["questions"]} questions'
      out.append((name, made['value'], made['interval'], over))
  if 'bits_per_byte' in entry:
    over = f'{entry["bytes"]} bytes'
    out.append(('bits per byte', entry['bits_per_byte'], None, over))
  return out


def notes(entry: Mapping[str, Any]) -> list[str]:
  """Returns lines on what an evaluation left out or could not finish."""
  of = f'{entry["what"]} of {entry["source"]}'
  out = []
  if entry.get('unfinished'):
    out.append(
      f'{of}: {entry["unfinished"]:.1%} of the answers had no end at'
      f' {entry["most"]} tokens'
    )
  if entry.get('verifier_errors'):
    out.append(
      f'{of}: {entry["verifier_errors"]} verifier errors, which count as no'
      ' answer'
    )
  if entry.get('unparsed_documents'):
    out.append(
      f'{of}: {entry["unparsed_documents"]} of {entry["documents"]} documents'
      ' are no Python and gave no function'
    )
  return out
