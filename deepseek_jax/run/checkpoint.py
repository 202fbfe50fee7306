"""Saves and restores checkpoints: training state, data position, configuration.

A thin layer over orbax. Arrays are stored under dotted names
('params.segments.0.0.attention.q_down'), so that a stored tree can be compared
with the wanted one by name before anything is read: orbax itself casts a
differing dtype silently and does not name an array of another shape. Every step
holds a manifest, committed with it, by which damage is found (see integrity).
A save that fails, as on a full disk, takes nothing that was saved before.
"""

import contextlib
import itertools
import math
import re
import shutil
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import integrity

_TRIES = 2  # saves that may fail in a row
_PAUSE = 5.0  # seconds before a save is tried again


class Restored(NamedTuple):
  """Describes a restored checkpoint.

  Attributes:
    state: of the training.
    data: where the data stream stood.
    config: of the run.
    held: arrays of the stream by dotted name, where they were asked for.
  """

  state: Any
  data: dict
  config: dict
  held: Mapping[str, Any] = types.MappingProxyType({})


def flatten(tree: Any) -> dict[str, Any]:
  """Returns a tree as {dotted name: leaf}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


def differences(stored: dict, wanted: dict) -> list[str]:
  """Returns a line per array that is missing, extra or of another kind.

  Both map names to something with a shape and a dtype, which are its kind.
  """
  kind = lambda a: f'{a.dtype}{list(a.shape)}'
  lines = [
    f'{name}: missing, expected {kind(wanted[name])}'
    for name in wanted
    if name not in stored
  ]
  lines += [
    f'{name}: {kind(stored[name])} is stored, the model has none'
    for name in stored
    if name not in wanted
  ]
  lines += [
    f'{name}: {kind(stored[name])} is stored, expected {kind(wanted[name])}'
    for name in wanted
    if name in stored and kind(stored[name]) != kind(wanted[name])
  ]
  return lines


class Checkpoints:
  """Saves the checkpoints of one run asynchronously; close it at the end."""

  def __init__(
    self,
    directory: str | Path,
    *,
    keep: int = 2,
    verify: str = 'full',
    read_only: bool = False,
    say: Callable[[str], None] = lambda line: None,
  ):
    """Opens a folder of checkpoints.

    Args:
      directory: made when needed.
      keep: how many steps stay.
      verify: what `newest_whole` reads: 'full', 'sample' or 'off'.
      read_only: beside a run that may be saving there now: nothing is made,
        and no save under way is taken for one that died.
      say: takes one line for every save that failed.
    """
    import orbax.checkpoint as ocp

    integrity.check_choice(verify)
    self._ocp, self._verify, self._say = ocp, verify, say
    self._saving, self._failed = None, 0
    self.directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      cleanup_tmp_directories=not read_only,
      create=not read_only,
      read_only=read_only,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    # Named, so that a manager that has saved nothing knows how to read, too.
    handlers = {
      'state': ocp.StandardCheckpointHandler(),
      'held': ocp.StandardCheckpointHandler(),
      'data': ocp.JsonCheckpointHandler(),
      'config': ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(
      self.directory, options=options, item_handlers=handlers
    )

  def __enter__(self) -> 'Checkpoints':
    """Returns itself; `close` follows at the end of the block."""
    return self

  def __exit__(self, *error: object) -> None:
    """Closes the folder, after an error too."""
    self.close()

  def close(self) -> None:
    """Waits for a save that is under way, then closes the manager."""
    with contextlib.suppress(InputError):  # it was reported
      self._settle()
    self._manager.close()

  def steps(self) -> list[int]:
    """Returns the complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def newest_whole(
    self,
    say: Callable[[str], None] = lambda line: None,
    *,
    before: float = math.inf,
  ) -> int | None:
    """Returns the newest step its manifest vouches for; None if none was saved.

    Args:
      say: takes one line for every step that is rejected.
      before: looks at steps below this number only.

    Raises:
      InputError: there are steps, but every one is damaged.
    """
    if not distributed.several():
      return self._newest_whole(say, before)
    # Process 0 reads for all of them. If it finds nothing whole, it ends.
    found = self._newest_whole(say, before) if distributed.first() else None
    found = distributed.from_first(-1 if found is None else found)
    return None if found < 0 else found

  def _newest_whole(
    self, say: Callable[[str], None], before: float
  ) -> int | None:
    """Returns `newest_whole` in the process that reads the files."""
    wrong = []
    for step in (s for s in reversed(self.steps()) if s < before):
      reason = integrity.problem(self.directory / str(step), self._verify)
      if reason is None:
        return step
      wrong.append(f'checkpoint {step} is rejected: {reason}')
      say(wrong[-1])
    if wrong:
      raise InputError(
        f'{self.directory}: no checkpoint is whole ({"; ".join(wrong)});'
        ' restore the files from a backup, remove the folder to start anew, or'
        ' set verify to off to read it as it is'
      )
    return None

  def check(self, step: int) -> None:
    """Raises InputError unless the manifest of `step` vouches for it."""
    reason = integrity.problem(self.directory / str(step), self._verify)
    if reason is not None:
      raise InputError(
        f'{self.directory}: checkpoint {step} is rejected: {reason}; name'
        f' another of {self.steps()}'
      )

  def set_aside_after(self, step: int) -> None:
    """Moves later steps to `<directory>-rejected`; they block their numbers."""
    aside = self.directory.with_name(self.directory.name + '-rejected')
    # Moved, not removed: a rejected step may still be of use.
    later = [s for s in self.steps() if s > step]
    for number in map(str, later if distributed.first() else []):
      aside.mkdir(exist_ok=True)
      (self.directory / number).rename(_unused(aside / number))
    distributed.wait_for_all()
    self._manager.reload()

  def _seal(self) -> None:
    """Writes the manifest when all files are on disk, before orbax commits.

    orbax calls it before the rename that commits the step; with several
    processes in the first alone, when all have written.
    """
    unfinished = f'{self._saving}.orbax-checkpoint-tmp*'
    for folder in self.directory.glob(unfinished):
      integrity.write_manifest(folder)

  def save(
    self,
    step: int,
    state: Any,
    data: dict,
    config: dict,
    *,
    held: Any = None,
    wait: bool = False,
  ) -> None:
    """Starts saving; arrays are copied before it returns.

    The next save makes up for one that fails.

    Args:
      step: completed steps.
      state: a tree of arrays.
      data: the data stream's state, JSON values.
      config: the resolved configuration, JSON values.
      held: a tree of arrays of the data stream, or nothing.
      wait: returns when all is on disk; tries again when that fails.

    Raises:
      InputError: the second save in a row failed.
    """
    self._settle()
    self._begin(step, state, data, config, held)
    while wait and not self._settle():
      time.sleep(_PAUSE)
      self._begin(step, state, data, config, held)

  def wait(self) -> None:
    """Waits until the last save is on disk, or has failed."""
    self._settle()

  def _begin(
    self, step: int, state: Any, data: dict, config: dict, held: Any
  ) -> None:
    """Hands a step to orbax, which writes it in the background."""
    args, self._saving = self._ocp.args, step
    more = {'held': args.StandardSave(flatten(held))} if held else {}
    items = args.Composite(
      state=args.StandardSave(flatten(state)),
      data=args.JsonSave(data),
      config=args.JsonSave(config),
      **more,
    )
    with self._counting_failures(step):
      self._manager.save(step, args=items)

  def _settle(self) -> bool:
    """Waits for a save under way; returns whether the last one is on disk."""
    if self._saving is not None:
      with self._counting_failures(self._saving):
        self._manager.wait_until_finished()
        self._failed = 0
      self._saving = None
    return self._failed == 0

  @contextlib.contextmanager
  def _counting_failures(self, step: int) -> Iterator[None]:
    """Counts and reports failures of storage; other errors pass.

    Removes the unfinished folder. Raises InputError at `_TRIES` failures in a
    row, with several processes at the first.
    """
    try:
      yield
    except Exception as error:
      reason = _storage_failure(error)
      if reason is None:
        raise
      self._saving, self._failed = None, self._failed + 1
      self._say(f'checkpoint {step} was not saved: {reason}')
      for unfinished in self.directory.glob(f'{step}.orbax-checkpoint-tmp*'):
        shutil.rmtree(unfinished, ignore_errors=True)
      # The others of several processes wait for this one.
      if self._failed < _TRIES and not distributed.several():
        return
      raise InputError(
        f'{self.directory}: checkpoint {step} cannot be saved ({reason});'
        f' checkpoints {self.steps()} are as they were: make room and start'
        ' again'
      ) from error

  def restore(
    self,
    step: int,
    like: Any,
    held: Callable[[str, Any], Any] | None = None,
  ) -> Restored:
    """Returns the checkpoint of `step`.

    Args:
      step: one of `steps()`.
      like: a tree of arrays or jax.ShapeDtypeStructs (with shardings, when
        they matter) that the stored state must equal in names, shapes, dtypes.
        Where it has NumPy's arrays, those are restored.
      held: maps the name of an array of the data stream, and its shape and
        dtype, to what `like` would have for it; None leaves them out.

    Raises:
      InputError: a difference, each named.
    """
    args = self._ocp.args
    # Compared by name first: orbax would cast dtypes without a word.
    wanted = flatten(like)
    stored = self._manager.item_metadata(step)['state']
    lines = differences(dict(stored), wanted)
    if lines:
      shown = '; '.join(lines[:4]) + (' ...' if len(lines) > 4 else '')
      raise InputError(
        f'{self.directory}/{step} is of another model ({len(lines)}'
        f' differences): {shown}'
      )
    abstract = jax.tree.map(_abstract, wanted)
    more = self._held(step, held) if held else {}
    restored = self._manager.restore(
      step,
      args=args.Composite(
        state=args.StandardRestore(abstract),
        data=args.JsonRestore(),
        config=args.JsonRestore(),
        **({'held': args.StandardRestore(more)} if more else {}),
      ),
    )
    leaves = [restored['state'][name] for name in wanted]
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
    kept = dict(restored['held']) if more else {}
    return Restored(tree, restored['data'], restored['config'], kept)

  def _held(
    self, step: int, held: Callable[[str, Any], Any]
  ) -> dict[str, np.ndarray | jax.ShapeDtypeStruct]:
    """Returns what to restore of the data stream's arrays, by name."""
    if not (self.directory / str(step) / 'held').exists():
      return {}
    stored = self._manager.item_metadata(step)['held']
    return {n: _abstract(held(n, stored[n])) for n in stored}


def _unused(path: Path) -> Path:
  """Returns the path, or with .1, .2 … behind it if something is there."""
  names = (path.with_name(f'{path.name}.{n}') for n in itertools.count(1))
  return next(p for p in itertools.chain([path], names) if not p.exists())


def _storage_failure(error: Exception) -> str | None:
  """Returns what a file system refused, in its words; None for other errors."""
  if isinstance(error, OSError):
    return error.strerror or str(error)
  # Tensorstore's errors are ValueErrors.
  found = re.search(r"([^:]*) \[os_error_code='\d+'", str(error))
  if found:
    return found[1].strip()
  return 'the disk is full' if 'RESOURCE_EXHAUSTED' in str(error) else None


def _abstract(array: Any) -> np.ndarray | jax.ShapeDtypeStruct:
  """Returns shape, dtype and sharding of an array; a NumPy array as it is."""
  if isinstance(array, np.ndarray):
    return array
  # Else orbax asks for the devices that the array was saved from.
  place = getattr(array, 'sharding', None) or jax.sharding.SingleDeviceSharding(
    jax.local_devices()[0]
  )
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
