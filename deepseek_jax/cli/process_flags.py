"""Defines flags of launchers that may run as several processes.

Without them the environment decides, see deepseek_jax/parallel/processes.py.
"""

from absl import flags

from deepseek_jax.parallel import endings
from deepseek_jax.parallel import processes as distributed

_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'Of several processes: host:port of process 0.'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are.', 1)
_PROCESS = flags.DEFINE_integer('process', None, 'Number of this one.', 0)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat', 60, 'Seconds of silence after which a process is dead.', 1
)


def join() -> distributed.Rendezvous:
  """Joins this process to its run; from now on they end together."""
  found = distributed.init_distributed(
    _COORDINATOR.value,
    _PROCESSES.value,
    _PROCESS.value,
    heartbeat_seconds=_HEARTBEAT.value,
  )
  endings.watch()
  return found
