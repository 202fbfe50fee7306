"""Writes the page of a run anew, with the curves of other runs over its own."""

from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.cli import finish, outputs
from deepseek_jax.errors import InputError
from deepseek_jax.record import comparison, results
from deepseek_jax.record.report import page

_KICKER = 'Training report'  # of templates/report.html.jinja


def redrawn(given: Sequence[str], out: str | None = None) -> Path:
  """Writes the page of a run; returns its path.

  Args:
    given: the run's folder, then those of runs beside it, or that hold some.
    out: where the page goes, in place of no file but such a page; None is the
      run's report.html.

  Raises:
    InputError: a folder holds no run, a file in it is damaged, or `out` is
      there and is no report.
  """
  if not given:
    raise InputError('give the folder of a run, then those of runs beside it')
  workdir = Path(given[0])
  if not (workdir / 'config.json').exists():
    raise InputError(f'{workdir}: holds no run (no config.json); name a run')
  if out:
    out = outputs.check_page(out, 'a report', _KICKER)
  others = [
    path
    for path in comparison.folders(given[1:])
    if path.resolve() != workdir.resolve()
  ]
  return page.draw(
    workdir,
    page.read_told(workdir) or unreported(workdir),
    beside=named(others),
    out=out,
  )


def unreported(workdir: Path) -> page.Told:
  """Returns the headline of a run that has no report yet."""
  title = f'Run {workdir.resolve().name}'
  reached = results.read(workdir)
  if not reached:
    return page.Told(title, notes=['This run has not ended.'])
  return page.told(title, finish.facts_of(reached))


def named(folders: Sequence[Path]) -> dict[str, Path]:
  """Returns folders by the ends of their paths that tell them apart."""
  whole = {path.resolve(): path for path in folders}
  out = {}
  for path, given in whole.items():
    same = [other for other in whole if other.name == path.name]
    length = 1
    while len({other.parts[-length:] for other in same}) < len(same):
      length += 1
    out['/'.join(path.parts[-length:])] = given
  return out
