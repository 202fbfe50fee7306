"""A run's folder: whose it is, and the run read back from it."""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deepseek_jax import config as configs
from deepseek_jax import data as datalib
from deepseek_jax.checkpoint import Checkpoints, flatten
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import distributed
from deepseek_jax.run import say
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train import TrainState, initial_state
from deepseek_jax.transformer import Model, build


def as_json(config: RunConfig) -> dict:
  return json.loads(json.dumps(configs.to_dict(config)))


def claim(workdir: Path, config: RunConfig) -> None:
  """Writes config.json, or checks that it is this run's.

  Raises:
    InputError: the folder is another run's; names the first fields that differ.
      Or several processes do not share it.
  """
  path = workdir / 'config.json'
  mine = as_json(config)
  if not distributed.first() and not path.exists():
    raise InputError(
      f'workdir {workdir}: process {jax.process_index()} does not see what'
      ' process 0 wrote there; choose a folder that all processes share'
    )
  if path.exists():
    lines = _differences(_filled(_object(path)), mine)
    if lines:
      raise InputError(
        f'workdir {workdir} holds another run ({"; ".join(lines[:3])}):'
        ' choose another --workdir or the same configuration'
      )
    return
  _make(workdir)
  if any(workdir.iterdir()):
    raise InputError(
      f'workdir {workdir} is not empty and holds no run: choose another'
      ' --workdir'
    )
  scratch = path.with_suffix('.tmp')
  scratch.write_text(json.dumps(mine, indent=2) + '\n')
  os.replace(scratch, path)


def _object(path: Path) -> dict:
  try:
    written = json.loads(path.read_text())
  except ValueError:
    written = None
    what = 'is not JSON'
  else:
    what = 'is not a JSON object'
  if not isinstance(written, dict):
    raise InputError(f'{path} {what}: mend it, or choose another --workdir')
  return written


def _make(workdir: Path) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except (
    FileExistsError,
    FileNotFoundError,  # of /proc, which takes no folders
    NotADirectoryError,
    PermissionError,
  ) as error:
    raise InputError(
      f'workdir {workdir}: cannot be made a folder ({error.strerror}); choose'
      ' another --workdir'
    ) from None


def config_of(workdir: Path) -> RunConfig:
  """The configuration that a run's folder holds.

  Raises:
    InputError: the folder holds no run, or its config.json is broken.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise InputError(f'workdir {workdir}: holds no run (no config.json)')
  return configs.from_dict(RunConfig, _object(path))


def _filled(written: dict) -> dict:
  """A config.json with the defaults of fields that came after it."""
  try:
    return as_json(configs.from_dict(RunConfig, written))
  except InputError:
    return written


def _differences(theirs: dict, mine: dict) -> list[str]:
  theirs, mine = flatten(theirs), flatten(mine)
  names = dict.fromkeys([*theirs, *mine])
  absent = 'absent'
  return [
    f'{n}: {theirs.get(n, absent)!r} there, {mine.get(n, absent)!r} here'
    for n in names
    if theirs.get(n, absent) != mine.get(n, absent)
    and not n.startswith(('safety.', 'mesh.'))
  ]


class Loaded(NamedTuple):
  """A run read back from its folder."""

  config: RunConfig
  model: Model
  variables: dict
  tokenizer: Any  # datalib.Tokenizer or ByteTokenizer
  step: int


def load(workdir: str | Path) -> Loaded:
  """The newest checkpoint of a run; needs none of its data.

  Raises:
    InputError: the folder holds no run, or none with a checkpoint.
  """
  workdir = Path(workdir)
  config = config_of(workdir)
  model = build(config.model)
  with Checkpoints(
    workdir / 'checkpoints', verify=config.safety.verify, read_only=True
  ) as checkpoints:
    step = checkpoints.newest_whole(say.warn)
    if step is None:
      raise InputError(f'workdir {workdir}: the run has saved no checkpoint')
    fresh = functools.partial(fresh_state, config, model)
    state = checkpoints.restore(step, jax.eval_shape(fresh)).state
  variables = {'params': state.params, 'buffers': state.buffers}
  tokenizer = datalib.from_file(str(workdir / 'tokenizer.json'))
  return Loaded(config, model, variables, tokenizer, step)


def fresh_state(config: RunConfig, model: Model) -> TrainState:
  """The state before the first step of a run."""
  variables = model.init(jax.random.key(config.seed))
  return initial_state(model, config.train, variables)
