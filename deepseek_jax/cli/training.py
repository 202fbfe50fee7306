"""Trains a run for a launcher: first lines, steps, results, report."""

import dataclasses
from pathlib import Path

from deepseek_jax.cli import common, finish, first_lines
from deepseek_jax.parallel import placement
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import fit as loop


def train(config: loop.RunConfig, workdir: Path) -> None:
  """Trains a run to its end; the first process samples and reports."""
  console = not common.quiet()
  run = loop.fit(config, workdir, console=console, announce=first_lines.lines)
  state = placement.to_first(run.state._replace(moments=None))
  if distributed.first():
    run = dataclasses.replace(run, state=state)
    finish.finish(run, workdir, quiet=not console)
