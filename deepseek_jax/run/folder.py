"""Claims a run's folder, and reads a run back from it."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deepseek_jax import config as configs
from deepseek_jax import data as datalib
from deepseek_jax import files, own_classes, say
from deepseek_jax.errors import InputError, told
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.record.metrics import set_aside
from deepseek_jax.run import extension, lock
from deepseek_jax.run.checkpoint import Checkpoints, Restored, flatten
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train.step import TrainState, initial_state


def as_json(config: RunConfig) -> dict:
  """Returns a configuration as the JSON values that config.json holds."""
  return json.loads(json.dumps(configs.to_dict(config)))


def code_of(config: RunConfig) -> dict:
  """Returns {'code': files of the users' classes}, or {} without such."""
  code = own_classes.sources(configs.to_dict(config))
  return {'code': code} if code else {}


# What may differ when a run goes on, as it changes no number that is trained:
# what faults do, where arrays lie, how XLA compiles, which files are kept, how
# often and in what batches is validated, when to give up. A dot at the end
# takes in all below.
_FREE = (
  'safety.',
  'mesh.',
  'keep',
  'checkpoint_every',
  'tensorboard',
  'wandb',
  'evaluate.every',
  'evaluate.at',
  'evaluate.batch',
  'rollouts.compare_every',
  'rollouts.patience',
  'rollouts.processes',
  'train.gate.patience',
  'data.cache_dir',
  'model.compute.xla',
  'model.compute.xla.',
)
_PREFIXES = tuple(name for name in _FREE if name.endswith('.'))
_MOVED = 'data.path'  # so may this, if a checkpoint vouches for the windows
_SCRATCH, _TOKENIZER = 'config.tmp', 'tokenizer.json'  # see files.whole


def claim(workdir: Path, config: RunConfig) -> list[str]:
  """Takes a folder for a run: writes config.json, or finds it to be this run's.

  Returns:
    How this configuration differs from that of config.json, one line a field,
    where it may; see `renew`.

  Raises:
    InputError: the folder is another run's; names the first fields that differ.
      Or another run is under way in it, or several processes do not share it.
  """
  path = workdir / 'config.json'
  if not distributed.first():
    if not path.exists():
      raise InputError(
        f'workdir {workdir}: process {jax.process_index()} does not see what'
        ' process 0 wrote there; choose a folder that all processes share'
      )
    return _changes(workdir, config)
  if path.exists():
    _changes(workdir, config)  # what is another run's is not even locked
  else:
    _make(workdir)
    _check_empty(workdir)
  lock.take(workdir)
  if path.exists():  # maybe by a run that was faster
    return _changes(workdir, config)
  renew(workdir, config)
  return []


def path_of(workdir: str | Path) -> Path:
  """Returns the path of a run's folder; InputError if no folder can have it."""
  if not isinstance(workdir, str | os.PathLike) or not str(workdir):
    raise InputError(f'workdir: is {told(workdir)}; give the folder of a run')
  if '\0' in str(workdir):
    raise InputError(f'workdir {str(workdir)!r}: is no path; choose another')
  return Path(workdir)


def renew(workdir: Path, config: RunConfig) -> None:
  """Writes config.json, in one rename.

  A run that goes on does so when its data are known to be those it began with:
  the file holds the newest command's values.
  """
  with files.whole(workdir / 'config.json') as scratch:
    written = as_json(config) | code_of(config)
    scratch.write_text(json.dumps(written, indent=2) + '\n')


def _changes(workdir: Path, config: RunConfig) -> list[str]:
  """Returns lines on what may differ and does; raises InputError on others."""
  written, code = _parts(_object(workdir / 'config.json'))
  own_classes.check_same(
    code,
    code_of(config).get('code', {}),
    f'workdir {workdir}',
    'put it back as it was, or begin another run with its weights'
    f' (--workdir=ANOTHER --config.init_from={workdir})',
  )
  lines = _differences(filled(written), as_json(config))
  saved = has_checkpoint(workdir)
  wrong = {
    name: line
    for name, line in lines.items()
    if not (_is_free(name) or (name == _MOVED and saved))
  }
  why = ''
  if wrong and wrong.keys() <= set(extension.FIELDS):
    why = _growth(written, config, newest(workdir))
  if wrong and why is not None:
    raise InputError(
      f'workdir {workdir} holds another run'
      f' ({"; ".join([*wrong.values()][:3])}): choose another --workdir or the'
      f' same configuration{why and f"; {why}"}'
    )
  return list(lines.values())


def _growth(written: dict, config: RunConfig, steps: int) -> str | None:
  """Returns why a run can't go on with other tokens; None if it can.

  Args:
    written: the configuration of a config.json or a checkpoint.
    config: the one asked for; it differs in extension.FIELDS alone.
    steps: that are saved.
  """
  try:
    old = configs.from_dict(RunConfig, written)
  except InputError as error:  # of an earlier version
    return str(error)
  return extension.problem(old, config, steps)


def newest(workdir: Path) -> int:
  """Returns the number of the newest step that is saved; 0 without any."""
  saved = workdir / 'checkpoints'
  names = [p.name for p in saved.iterdir()] if saved.is_dir() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def _is_free(name: str) -> bool:
  """Returns whether a field may differ when a run goes on."""
  return name in _FREE or name.startswith(_PREFIXES)


def has_checkpoint(workdir: Path) -> bool:
  """Returns whether a run has saved a step, even a damaged one."""
  saved = workdir / 'checkpoints'
  return saved.is_dir() and any(p.name.isdigit() for p in saved.iterdir())


def config_of_source(field: str, source: str) -> RunConfig:
  """Returns the configuration of the run whose weights a field asks for.

  Raises:
    InputError: the folder holds no run, or one without a checkpoint.
  """
  try:
    config = config_of(Path(source), same_code=False)
  except InputError as error:
    raise InputError(f'{field} = {source!r}: {error}') from None
  if not has_checkpoint(Path(source)):
    raise InputError(
      f'{field} = {source!r}: the run has saved no checkpoint; name one that'
      ' has'
    )
  return config


def _check_empty(workdir: Path) -> None:
  """Raises unless the folder has nothing but files of a run not started."""
  if any(p.name not in (lock.FILE, _SCRATCH) for p in workdir.iterdir()):
    raise InputError(
      f'workdir {workdir} is not empty and holds no run: choose another'
      ' --workdir'
    )


def _object(path: Path) -> dict:
  """Returns the JSON object in a file; InputError if there is none."""
  try:
    written = json.loads(path.read_text())
  except (ValueError, RecursionError):
    written = None
    what = 'is not JSON'
  else:
    what = 'is not a JSON object'
  if not isinstance(written, dict):
    raise InputError(f'{path} {what}: mend it, or choose another --workdir')
  return written


def _make(workdir: Path) -> None:
  """Makes the folder; InputError if the system refuses."""
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


def config_of(workdir: Path, *, same_code: bool = True) -> RunConfig:
  """Returns the configuration that a run's folder holds.

  Imports nothing: users' classes must have been imported before.

  Args:
    workdir: the run's folder.
    same_code: refuses users' classes of a file that has changed since.

  Raises:
    InputError: the folder holds no run, its config.json is broken, or a class
      in it is not loaded or of another file than the run's.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise InputError(f'workdir {workdir}: holds no run (no config.json)')
  written, code = _parts(_object(path))
  own_classes.check_loaded(written, code, f'workdir {workdir}')
  if same_code:
    own_classes.check_same(
      code,
      own_classes.sources(written),
      f'workdir {workdir}',
      'give the file as it was when the run was trained',
    )
  return configs.from_dict(RunConfig, written)


def _parts(written: dict) -> tuple[dict, dict]:
  """Returns the configuration and the code of a config.json."""
  code = written.get('code')
  rest = {name: value for name, value in written.items() if name != 'code'}
  return rest, code if isinstance(code, dict) else {}


def filled(written: dict) -> dict:
  """Returns a config.json with defaults for the fields that came after it."""
  try:
    return as_json(configs.from_dict(RunConfig, written))
  except InputError:
    return written


def _differences(theirs: dict, mine: dict) -> dict[str, str]:
  """Returns {field: how it differs}, in dotted names."""
  theirs, mine = flatten(theirs), flatten(mine)
  absent = 'absent'
  return {
    n: f'{n}: {theirs.get(n, absent)!r} there, {mine.get(n, absent)!r} here'
    for n in dict.fromkeys([*theirs, *mine])
    if theirs.get(n, absent) != mine.get(n, absent)
  }


class Loaded(NamedTuple):
  """Holds a run read back from its folder."""

  config: RunConfig
  model: Model
  variables: dict
  tokenizer: Any  # datalib.Tokenizer or ByteTokenizer
  step: int


def load(
  workdir: str | Path, step: int | None = None, *, same_code: bool = True
) -> Loaded:
  """Returns a run read back from its folder; needs none of its data.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None is the newest whole one.
    same_code: see `config_of`.

  Raises:
    InputError: the folder holds no run, or no whole checkpoint of that step;
      or see `config_of`.
  """
  workdir = path_of(workdir)
  config = config_of(workdir, same_code=same_code)
  model = build(config.model)
  with Checkpoints(
    workdir / 'checkpoints', verify=config.safety.verify, read_only=True
  ) as checkpoints:
    step = _step_to_load(checkpoints, workdir, step)
    fresh = functools.partial(fresh_state, config, model)
    restored = restore(checkpoints, step, jax.eval_shape(fresh), config)
  state = restored.state
  variables = {'params': state.params, 'buffers': state.buffers}
  tokenizer = datalib.from_file(str(workdir / _TOKENIZER))
  bound = restored.data.get('tokenizer_sha256', tokenizer.sha256)
  if tokenizer.sha256 != bound:
    raise InputError(
      f'{workdir / _TOKENIZER} is not the tokenizer that the run was trained'
      f' with (sha256 {tokenizer.sha256}, checkpoint {step} says {bound}): put'
      ' back the one of the run; its training command does'
    )
  return Loaded(config, model, variables, tokenizer, step)


def _step_to_load(
  checkpoints: Checkpoints, workdir: Path, asked: int | None
) -> int:
  """Returns the step asked for, or the newest whole one."""
  if asked is None:
    newest = checkpoints.newest_whole(say.warn)
    if newest is None:
      raise InputError(f'workdir {workdir}: the run has saved no checkpoint')
    return newest
  saved = checkpoints.steps()
  if asked not in saved:
    raise InputError(
      f'step = {asked!r}: workdir {workdir} has saved'
      f' {", ".join(map(str, saved)) or "no step"}; name one of these'
    )
  checkpoints.check(asked)
  return asked


def restore(
  checkpoints: Checkpoints,
  step: int,
  like: TrainState,
  config: RunConfig,
  held: Callable[[str, Any], Any] | None = None,
) -> Restored:
  """Returns the checkpoint of a step of this run.

  Args:
    checkpoints: of the run.
    step: by the name of its folder.
    like, held: see `Checkpoints.restore`.
    config: of the run.

  Raises:
    InputError: the folder holds another step, or one that was saved with other
      values of fields that change numbers.
  """
  restored = checkpoints.restore(step, like, held)
  where, inside = checkpoints.directory / str(step), int(restored.state.step)
  if inside != step:
    raise InputError(
      f'{where} holds the state of step {inside}: give the folder its own name'
      f' again ({inside}), or remove it'
    )
  if not restored.config:  # saved by hand
    return restored
  lines = _differences(filled(restored.config), as_json(config))
  other = {n for n in lines if not _is_free(n) and n != _MOVED}
  if other and other <= set(extension.FIELDS):
    other = other if _growth(restored.config, config, step) else set()
  wrong = [lines[n] for n in lines if n in other]
  if wrong:
    raise InputError(
      f'{where} was saved with another configuration ({"; ".join(wrong[:3])}):'
      ' put these values back into config.json and into the command, or begin'
      f' another run with its weights (--config.init_from={where.parents[1]})'
    )
  return restored


def keep_tokenizer(
  workdir: Path,
  tokenizer: datalib.Tokenizer | datalib.ByteTokenizer,
  bound: str | None,
) -> None:
  """Writes tokenizer.json unless it is the one that the run is trained with.

  Args:
    workdir: of the run.
    tokenizer: of the data.
    bound: SHA-256 of the run's, where a checkpoint stores it.

  Raises:
    InputError: neither `tokenizer` nor the one there is the run's.
  """
  path, bound = workdir / _TOKENIZER, bound or tokenizer.sha256
  try:
    there = datalib.from_file(str(path)).sha256
  except InputError:
    there = None
  if there == bound:
    return
  if tokenizer.sha256 != bound:
    raise InputError(
      f'data.tokenizer: is not the one that the run is trained with (sha256'
      f' {tokenizer.sha256}, the checkpoint says {bound}), nor is {path}; put'
      ' back the file of the run'
    )
  if path.exists():
    aside = [
      set_aside(file)
      for file in (path, workdir / 'tokenizer_config.json')
      if file.exists()
    ]
    say.warn(
      f'{path} is not of this run: it is now {aside[0]}, and the right one is'
      ' written anew'
    )
  tokenizer.save(str(workdir))


def fresh_state(config: RunConfig, model: Model) -> TrainState:
  """Returns the state before the first step of a run."""
  variables = model.init(jax.random.key(config.seed))
  return initial_state(model, config.train, variables)
