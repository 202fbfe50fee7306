"""SIGTERM and Ctrl-C as a question that the loop answers between two steps.

Schedulers send it some time before they kill. The handler takes note alone, as
saving inside of a handler could meet a save that is under way. Of several
processes JAX tells all when one was asked, and names a step to come at which
all of them learn of it.
"""

import os
import signal
import threading

from deepseek_jax.parallel import processes as distributed


class Preemption:
  """While entered, SIGTERM makes `asked` true and does nothing else.

  So does SIGINT once a step is done; before, there is nothing to save, and it
  ends what is under way (a compilation may take long), as a second one does.
  Python takes signal handlers in its main thread only; elsewhere signals keep
  their meaning and `asked` stays False.
  """

  def __init__(self):
    self._noted = False
    self._before = {}  # signal -> the handler to put back
    self._main = False

  def __enter__(self) -> 'Preemption':
    main = threading.current_thread() is threading.main_thread()
    self._main = main and not distributed.several()
    self._take(signal.SIGTERM, self._take_note)
    return self

  def __exit__(self, *error):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _take(self, number: int, handler):
    # A job in the background may have been started deaf to Ctrl-C.
    deaf = signal.getsignal(number) is signal.SIG_IGN
    if self._main and not deaf and number not in self._before:
      self._before[number] = signal.signal(number, handler)

  def asked(self, step: int) -> bool:
    """Whether to end with this step; each process asks once in every step."""
    if not distributed.several():
      self._take(signal.SIGINT, self._interrupted)
      return self._noted
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def _take_note(self, number, frame):
    del number, frame
    self._noted = True

  def _interrupted(self, number, frame):
    del number, frame
    self._noted = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not print, which a signal may find in the middle of another print.
    os.write(
      2, b'\nwill end with this step and save it; Ctrl-C again: at once\n'
    )
