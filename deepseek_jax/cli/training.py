"""Trains a run for a launcher: first lines, steps, results, report."""

import dataclasses
from pathlib import Path

from absl import flags

from deepseek_jax.cli import common, finish, first_lines, post_training
from deepseek_jax.parallel import placement
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import fit as loop
from deepseek_jax.run import profile

_PROFILE = flags.DEFINE_string(
  'profile', None, 'First and last step of a trace: 10:12.'
)


def profiled() -> str | None:
  """Returns the steps of which the user wants a trace, as the flag has them."""
  return _PROFILE.value


def train(config: loop.RunConfig, workdir: Path) -> None:
  """Trains a run to its end; the first process reports.

  What it reports is what the launcher of such a run does.
  """
  console = not common.quiet()
  span = _PROFILE.value and profile.steps(_PROFILE.value)
  text = post_training.launcher(config) == 'pretrain'
  announce = first_lines.lines if text else None
  run = loop.fit(
    config, workdir, console=console, announce=announce, profile=span
  )
  if not text:
    post_training.finish(run, workdir)
    return
  state = placement.to_first(run.state._replace(moments=None))
  if distributed.first():
    run = dataclasses.replace(run, state=state)
    finish.finish(run, workdir, quiet=not console)
