"""Sends a run's scalars elsewhere: TensorBoard, Weights & Biases, one's own.

A writer is anything with the methods of `ScalarWriter`; `ds.fit` takes several.
metrics.jsonl is written in any case, and is what resuming reads.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from deepseek_jax.errors import InputError


class ScalarWriter(Protocol):
  """Takes the scalars of a run; `write` comes once for each line of metrics."""

  def write(
    self, step: int, scalars: Mapping[str, float], timings: Mapping[str, float]
  ) -> None:
    """Takes one step's numbers.

    Args:
      step: completed steps; the same again for later lines of a step.
      scalars: what the seed determines.
      timings: what depends on the clock.
    """

  def close(self) -> None:
    """Ends; comes after an error, too."""


def named(
  scalars: Mapping[str, float], timings: Mapping[str, float]
) -> dict[str, float]:
  """Returns both as one, timings below 'timings/'."""
  return {**scalars, **{f'timings/{k}': v for k, v in timings.items()}}


class TensorBoard:
  """Writes event files to a run's folder; `tensorboard --logdir` shows them.

  Raises:
    InputError: tensorboardX is not installed.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int | None):
    """Opens the files; drops what is later than `resume_step`."""
    try:
      import tensorboardX
    except ImportError:
      raise InputError(
        'tensorboard=True needs tensorboardX: pip install tensorboardX, or set'
        ' tensorboard=False'
      ) from None
    purge = None if resume_step is None else resume_step + 1
    self._events = tensorboardX.SummaryWriter(
      str(Path(workdir) / 'tensorboard'), purge_step=purge
    )

  def write(
    self, step: int, scalars: Mapping[str, float], timings: Mapping[str, float]
  ) -> None:
    """Writes one event for each number."""
    for name, value in named(scalars, timings).items():
      self._events.add_scalar(name, value, step)

  def hparams(self, config: Mapping[str, Any], reached: Mapping) -> None:
    """Writes the configuration beside what the run reached with it.

    Args:
      config: dotted field -> value.
      reached: metric -> its last value.
    """
    plain = lambda v: v if isinstance(v, bool | int | float | str) else str(v)
    fields = {name: plain(value) for name, value in config.items()}
    self._events.add_hparams(fields, dict(reached), name='hparams')

  def close(self) -> None:
    """Closes the files."""
    self._events.close()


class WandB:
  """Sends scalars to Weights & Biases; a resumed run goes on in its own page.

  WANDB_MODE=offline keeps everything in the run's folder.

  Raises:
    InputError: wandb is not installed.
  """

  def __init__(
    self, workdir: str | os.PathLike, project: str, config: Mapping[str, Any]
  ):
    """Begins or resumes the page of a run.

    Args:
      workdir: the run's folder; its name is the page's.
      project: where the page is.
      config: the run's configuration, plain values.
    """
    try:
      import wandb
    except ImportError:
      raise InputError(
        f"wandb='{project}' needs wandb: pip install wandb, or set wandb=''"
      ) from None
    path = Path(workdir) / 'wandb-id.txt'
    if not path.exists():
      path.write_text(os.urandom(4).hex())
    self._run = wandb.init(
      project=project,
      name=Path(workdir).name,
      id=path.read_text().strip(),
      resume='allow',
      dir=str(workdir),
      config=dict(config),
    )

  def write(
    self, step: int, scalars: Mapping[str, float], timings: Mapping[str, float]
  ) -> None:
    """Sends one step's numbers."""
    self._run.log(named(scalars, timings), step=step)

  def close(self) -> None:
    """Ends the page of this launch."""
    self._run.finish()
