"""SIGTERM, SIGHUP and Ctrl-C as a question that the loop answers between steps.

Schedulers send SIGTERM some time before they kill, and a terminal that is
closed sends SIGHUP. The handler takes note alone, as saving inside of a handler
could meet a save that is under way. Of several processes JAX tells all when one
was asked, and names a step to come at which all of them learn of it.

Before the first step of a launch there is nothing to save, and reading text or
compiling may take longer than a scheduler waits: the process ends at once.
"""

import os
import signal
import threading

from deepseek_jax.errors import Terminated
from deepseek_jax.parallel import endings
from deepseek_jax.parallel import processes as distributed

_HANGUP = getattr(signal, 'SIGHUP', None)  # not everywhere
_SECONDS = 3.0  # to unwind in, for a process that is to end at once


class Preemption:
  """While entered, SIGTERM and SIGHUP end the run well.

  Before `begin` they raise Terminated; where the main thread does not come to
  that, inside of a compiler say, the process ends all the same. After `begin`
  they make `asked` true and do nothing else.

  So does SIGINT once a step is done; before, there is nothing to save, and it
  ends what is under way (a compilation may take long), as a second one does.
  Python takes signal handlers in its main thread only; elsewhere signals keep
  their meaning and `asked` stays False.
  """

  def __init__(self):
    self._noted = self._begun = False
    self._before = {}  # signal -> the handler to put back
    self._main = False
    self._over = threading.Event()
    self._pipe, self._terminals = (), ()

  def __enter__(self) -> 'Preemption':
    self._main = threading.current_thread() is threading.main_thread()
    self._terminals = [number for number in (1, 2) if _is_terminal(number)]
    self._take(signal.SIGTERM, self._take_note)
    if _HANGUP is not None:
      self._take(_HANGUP, self._hung_up)
    if self._main:
      self._watch()
    return self

  def __exit__(self, *error):
    self._over.set()
    if self._pipe:
      signal.set_wakeup_fd(-1)
      os.close(self._pipe[1])  # ends the thread
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _take(self, number: int, handler):
    # A job in the background may have been started deaf to Ctrl-C or SIGHUP.
    deaf = signal.getsignal(number) is signal.SIG_IGN
    if self._main and not deaf and number not in self._before:
      before = signal.signal(number, handler)
      # None: of a handler that is not Python's, which cannot be put back.
      self._before[number] = signal.SIG_DFL if before is None else before

  def begin(self) -> None:
    """Is called before the first step: from now on there is much to save."""
    if self._begun:
      return
    self._begun = True
    if distributed.several():
      distributed.share_preemptions()

  def asked(self, step: int) -> bool:
    """Whether to end with this step; each process asks once in every step."""
    if not distributed.several():
      self._take(signal.SIGINT, self._interrupted)
      return self._noted
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def _take_note(self, number, frame):
    del frame
    if not self._begun:
      raise Terminated(_line(number))
    self._noted = True

  def _hung_up(self, number, frame):
    # A write to a terminal that is gone would end the run before it has saved.
    for terminal in self._terminals:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, terminal)
      os.close(nowhere)
    self._take_note(number, frame)
    if distributed.several():
      signal.raise_signal(signal.SIGTERM)  # which JAX waits for

  def _interrupted(self, number, frame):
    del number, frame
    self._noted = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not print, which a signal may find in the middle of another print.
    os.write(
      2, b'\nwill end with this step and save it; Ctrl-C again: at once\n'
    )

  def _watch(self) -> None:
    """Starts the thread for a main thread that never comes to a handler."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    if before != -1:  # an event loop, which has its own way out
      signal.set_wakeup_fd(before)
      os.close(read)
      os.close(write)
      return
    self._pipe = read, write
    threading.Thread(target=self._listen, args=(read,), daemon=True).start()

  def _listen(self, pipe: int) -> None:
    while received := os.read(pipe, 1):
      taken = received[0] in (signal.SIGTERM, _HANGUP)
      if not taken or received[0] not in self._before or self._begun:
        continue
      if not self._over.wait(_SECONDS) and not self._begun:
        try:
          endings.leave(Terminated.status, _line(received[0]))
        finally:  # a process by itself raises SystemExit, here in vain
          os._exit(Terminated.status)
    os.close(pipe)


def _line(number: int) -> str:
  return (
    f'{signal.Signals(number).name} before the first step: nothing new is'
    ' saved; the same command goes on from where it was'
  )


def _is_terminal(number: int) -> bool:
  try:
    return os.isatty(number)
  except OSError:
    return False
