"""SIGTERM as a question that the loop answers between two steps.

Schedulers send it some time before they kill. The handler takes note alone, as
saving inside of a handler could meet a save that is under way.
"""

import signal
import threading


class Preemption:
  """While entered, SIGTERM sets `asked` and does nothing else.

  Python takes signal handlers in its main thread only; elsewhere SIGTERM keeps
  its meaning and `asked` stays False.
  """

  def __init__(self):
    self.asked = False
    self._before = None

  def __enter__(self) -> 'Preemption':
    if threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._take_note)
    return self

  def __exit__(self, *error):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _take_note(self, number, frame):
    del number, frame
    self.asked = True
