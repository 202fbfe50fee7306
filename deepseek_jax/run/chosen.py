"""Fills in what a run's configuration leaves to the machine, once."""

import dataclasses
import json
from pathlib import Path

from deepseek_jax.run.config import RunConfig


def chosen(config: RunConfig, workdir: Path) -> RunConfig:
  """Returns a run's configuration with the machine's choices filled in.

  A run that has begun keeps what it chose then, whatever machine goes on with
  it: its config.json tells. What the configuration says itself stays.

  Args:
    config: as it was given.
    workdir: the run's folder, which may not exist yet.
  """
  compute = config.model.compute
  if compute.dtype is not None and compute.xla is not None:
    return config
  written = _written(workdir)
  if written is None:
    made = compute.chosen()
  else:
    xla = compute.xla
    if xla is None and isinstance(written.get('xla'), list):
      xla = tuple(map(tuple, written['xla']))
    made = dataclasses.replace(
      compute,
      dtype=compute.dtype or written.get('dtype') or compute.products,
      xla=xla,
    )
  model = dataclasses.replace(config.model, compute=made)
  return dataclasses.replace(config, model=model)


def _written(workdir: Path) -> dict | None:
  """Returns model.compute of a run's config.json; None if there is none.

  What is wrong with the file is for `folder.claim` to tell.
  """
  try:
    written = json.loads((workdir / 'config.json').read_text('utf-8'))
    found = written['model'].get('compute', {})
    lists = all(isinstance(pair, list) for pair in found.get('xla') or ())
  except (OSError, ValueError, LookupError, TypeError, AttributeError):
    return None
  except RecursionError:
    return None
  return found if lists else None
