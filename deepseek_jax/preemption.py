"""SIGTERM as a question that the loop answers between two steps.

Schedulers send it some time before they kill. The handler takes note alone, as
saving inside of a handler could meet a save that is under way. Of several
processes JAX tells all when one was asked, and names a step to come at which
all of them learn of it.
"""

import signal
import threading

from deepseek_jax.parallel import distributed


class Preemption:
  """While entered, SIGTERM makes `asked` true and does nothing else.

  Python takes signal handlers in its main thread only; elsewhere SIGTERM keeps
  its meaning and `asked` stays False.
  """

  def __init__(self):
    self._noted = False
    self._before = None

  def __enter__(self) -> 'Preemption':
    main = threading.current_thread() is threading.main_thread()
    if main and not distributed.several():
      self._before = signal.signal(signal.SIGTERM, self._take_note)
    return self

  def __exit__(self, *error):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def asked(self, step: int) -> bool:
    """Whether to end with this step; each process asks once in every step."""
    if not distributed.several():
      return self._noted
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def _take_note(self, number, frame):
    del number, frame
    self._noted = True
