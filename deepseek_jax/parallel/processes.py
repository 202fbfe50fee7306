"""Joins several processes to one run: who is who, and waiting for each other.

Explicit arguments win over the environment (DSJ_COORDINATOR, DSJ_PROCESSES,
DSJ_PROCESS), and that over what JAX finds out under SLURM, Open MPI and
Kubernetes. The coordinator's port takes no password: keep it in a private
network.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.errors import InputError, PeerLost

_NAMES = ('DSJ_COORDINATOR', 'DSJ_PROCESSES', 'DSJ_PROCESS')
_PATIENCE = 24 * 3600  # seconds that processes wait where one of them works
_names = itertools.count()


class Rendezvous(NamedTuple):
  """Describes how processes find each other.

  Attributes:
    found_by: 'arguments', 'environment', 'slurm', 'openmpi', 'kubernetes', or
      'nobody' for a process by itself.
    coordinator: 'host:port' of process 0; None leaves it to JAX.
    count: processes; None leaves it to JAX.
    index: of this process, from 0; None leaves it to JAX.
  """

  found_by: str
  coordinator: str | None = None
  count: int | None = None
  index: int | None = None


def find_cluster(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  environment: Mapping[str, str] = os.environ,
) -> Rendezvous:
  """Returns the cluster that `init_distributed` joins.

  Args:
    coordinator: 'host:port' of process 0.
    processes: how many there are.
    process: number of this one, from 0.
    environment: variables to look for it in when none of these is given.

  Raises:
    InputError: arguments or variables are incomplete or out of range.
  """
  names = ('coordinator', 'processes', 'process')
  given = (coordinator, processes, process)
  if any(value is not None for value in given):
    return _complete('arguments', names, given)
  given = tuple(environment.get(name) for name in _NAMES)
  if any(given):
    return _complete('environment', _NAMES, given)
  if int(environment.get('SLURM_NTASKS', 1)) > 1 and {
    'SLURM_STEP_NODELIST',
    'SLURM_PROCID',
  } <= set(environment):
    return Rendezvous('slurm')
  if int(environment.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    return Rendezvous('openmpi')
  if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= set(environment):
    return Rendezvous('kubernetes')
  return Rendezvous('nobody', count=1, index=0)


def _complete(
  found_by: str, names: Sequence[str], given: Sequence[str | int | None]
) -> Rendezvous:
  """Returns the cluster of a given coordinator, count and index.

  Raises:
    InputError: one of them is missing, not a whole number or out of range; the
      message has its name of `names`.
  """
  numbers = []
  for name, value in zip(names[1:], given[1:]):
    try:
      numbers.append(None if value in (None, '') else int(value))
    except ValueError:
      raise InputError(f'{name} = {value!r}: must be a whole number') from None
  count, index = numbers
  if count == 1:
    return Rendezvous(found_by, given[0], 1, 0)
  for name, value in zip(names, (given[0], count, index)):
    if value is None:
      raise InputError(f'{name} is missing: give all of {", ".join(names)}')
  if not 0 <= index < count:
    raise InputError(
      f'{names[2]} = {index}: must lie in 0..{count - 1} with {names[1]} ='
      f' {count}'
    )
  if not given[0].rpartition(':')[2].isdigit():
    raise InputError(f'{names[0]} = {given[0]!r}: write host:port')
  return Rendezvous(found_by, given[0], count, index)


def init_distributed(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  heartbeat_seconds: int = 60,
  connect_seconds: int = 300,
) -> Rendezvous:
  """Joins this process to its run; before anything asks JAX for devices.

  Prints one line that says who is who. A process by itself is left as it is.

  Args:
    coordinator: 'host:port' of process 0.
    processes: how many there are.
    process: number of this one, from 0.
    heartbeat_seconds: after so much silence a process is taken for dead and the
      others end; compiling and collecting garbage are silent, too.
    connect_seconds: to wait for the others.

  Returns:
    The cluster, with its count and index.

  Raises:
    InputError: arguments or variables are incomplete, out of range, or what
      JAX finds is not enough.
  """
  found = find_cluster(coordinator, processes, process)
  if found.count == 1:
    return found
  # Until the first step SIGTERM ends a process at once; see preemption.
  jax.config.update('jax_enable_preemption_service', False)
  # After the end the others may have to wait for what process 0 writes.
  try:
    jax.distributed.initialize(
      found.coordinator,
      found.count,
      found.index,
      initialization_timeout=connect_seconds,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=_PATIENCE,
    )
  except ValueError as error:
    raise InputError(
      f'processes found by {found.found_by}: {error}; set {", ".join(_NAMES)},'
      ' or DSJ_PROCESSES=1 for a process by itself'
    ) from None
  found = found._replace(count=jax.process_count(), index=jax.process_index())
  print(
    f'process {found.index} of {found.count} (found by {found.found_by}):'
    f' {jax.local_device_count()} of {jax.device_count()}'
    f' {jax.default_backend()} devices',
    flush=True,
  )
  return found


def several() -> bool:
  """Returns whether this process is one of several."""
  # First, as the second question makes JAX look for its devices.
  return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
  """Returns whether this process is the one that writes."""
  return not several() or jax.process_index() == 0


def wait_for_all() -> None:
  """Returns when every process has come here."""
  if not several():
    return
  from orbax.checkpoint import multihost

  # Not by a collective, which gives up after some time.
  barrier = multihost.get_barrier_sync_fn()
  barrier(key=f'deepseek_jax_{next(_names)}', timeout_ms=_PATIENCE * 1000)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
  """Runs the body in process 0, and then in all others.

  It suits what one process makes and the others then find done.
  """
  if not first():
    wait_for_all()
  yield
  if first():
    wait_for_all()


def from_first(number: int) -> int:
  """Returns what process 0 passes, in every process; int32."""
  if not several():
    return number
  from jax.experimental import multihost_utils

  wait_for_all()
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def text_from_first(text: str) -> str:
  """Returns the text that process 0 passes, in every process."""
  if not several():
    return text
  key = f'deepseek_jax/text/{next(_names)}'
  if first():
    client().key_value_set(key, text)
    return text
  return client().blocking_key_value_get(key, _PATIENCE * 1000)


def client() -> Any:
  """Returns the client of JAX's coordination service."""
  from jax._src import distributed as internal

  return internal.global_state.client


def share_preemptions() -> None:
  """Makes SIGTERM to one process a notice to all; JAX takes the signal."""
  from jax._src import distributed as internal

  if internal.global_state.preemption_sync_manager is None:
    jax.config.update('jax_enable_preemption_service', True)
    internal.global_state.initialize_preemption_sync_manager()


def peer_lost(error: Exception) -> PeerLost | None:
  """Returns the loss of a peer that `error` reports; None if it reports none.

  A collective fails with the words of its transport, which are many; what is
  known not to be a loss is memory.
  """
  runtime = isinstance(error, jax.errors.JaxRuntimeError)
  if not several() or not runtime or 'RESOURCE_EXHAUSTED' in str(error):
    return None
  what = str(error).splitlines()[0]
  return PeerLost(
    f'process {jax.process_index()}: another process seems to be gone ({what});'
    ' start all of them again'
  )
