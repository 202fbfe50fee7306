"""Turns SIGTERM, SIGHUP and Ctrl-C into a question between steps.

Schedulers send SIGTERM some time before they kill, and a terminal that is
closed sends SIGHUP. The handler only sets a flag, as saving inside of a handler
could meet a save that is under way. With several processes JAX notifies all
when one was asked, and names a coming step at which all of them learn of it.

Before the first step of a launch there is nothing to save, and reading text or
compiling may take longer than a scheduler waits: the process ends at once.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from deepseek_jax.errors import Terminated
from deepseek_jax.parallel import endings
from deepseek_jax.parallel import processes as distributed

_HANGUP = getattr(signal, 'SIGHUP', None)  # not everywhere
_SECONDS = 3.0  # to unwind in, for a process that is to end at once


class Preemption:
  """Ends the run in order on SIGTERM and SIGHUP, while entered.

  Before `begin` they raise Terminated; where the main thread does not come to
  that, inside of a compiler say, the process ends all the same. After `begin`
  they make `asked` true and do nothing else.

  So does SIGINT once a step is done; before, there is nothing to save, and it
  ends what is under way (a compilation may take long), as a second one does.
  Python takes signal handlers in its main thread only; elsewhere signals keep
  their meaning and `asked` stays False.
  """

  def __init__(self):
    """Takes no signal yet; entering does."""
    self._noted = self._begun = False
    self._before = {}  # signal -> the handler to put back
    self._main = False
    self._over = threading.Event()
    self._pipe, self._terminals = (), ()

  def __enter__(self) -> 'Preemption':
    """Installs the handlers, in the main thread only."""
    self._main = threading.current_thread() is threading.main_thread()
    self._terminals = [number for number in (1, 2) if _is_terminal(number)]
    self._take(signal.SIGTERM, self._take_note)
    if _HANGUP is not None:
      self._take(_HANGUP, self._hung_up)
    if self._main:
      self._watch()
    return self

  def __exit__(self, *error: object) -> None:
    """Puts the handlers back that were there before."""
    self._over.set()
    if self._pipe:
      signal.set_wakeup_fd(-1)
      os.close(self._pipe[1])  # ends the thread
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _take(
    self, number: int, handler: Callable[[int, FrameType | None], None]
  ) -> None:
    """Installs a handler in the main thread and remembers the one before."""
    # A job in the background may have been started deaf to Ctrl-C or SIGHUP.
    deaf = signal.getsignal(number) is signal.SIG_IGN
    if self._main and not deaf and number not in self._before:
      before = signal.signal(number, handler)
      # None: of a handler that is not Python's, which cannot be put back.
      self._before[number] = signal.SIG_DFL if before is None else before

  def begin(self) -> None:
    """Notes that the first step begins: from now on there is work to save."""
    if self._begun:
      return
    self._begun = True
    if distributed.several():
      distributed.share_preemptions()

  def asked(self, step: int) -> bool:
    """Returns whether to end with this step; each process asks every step."""
    if not distributed.several():
      self._take(signal.SIGINT, self._interrupted)
      return self._noted
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def _take_note(self, number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM: raises Terminated before `begin`, later takes note."""
    del frame
    if not self._begun:
      raise Terminated(_line(number))
    self._noted = True

  def _hung_up(self, number: int, frame: FrameType | None) -> None:
    """Handles SIGHUP as SIGTERM, with output to lost terminals discarded."""
    # A write to a terminal that is gone would end the run before it has saved.
    for terminal in self._terminals:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, terminal)
      os.close(nowhere)
    self._take_note(number, frame)
    if distributed.several():
      signal.raise_signal(signal.SIGTERM)  # which JAX waits for

  def _interrupted(self, number: int, frame: FrameType | None) -> None:
    """Handles the first Ctrl-C; a second one interrupts at once."""
    del number, frame
    self._noted = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not print, which a signal may find in the middle of another print.
    os.write(
      2, b'\nwill end with this step and save it; Ctrl-C again: at once\n'
    )

  def _watch(self) -> None:
    """Starts the thread for a main thread that never comes to a handler."""
    # The interpreter writes a signal's number here at once, while the handler
    # waits for the main thread.
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
    """Ends the process if a signal before `begin` is not handled in time."""
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
  """Returns the message of a run that ends before its first step."""
  return (
    f'{signal.Signals(number).name} before the first step: nothing new is'
    ' saved; the same command goes on from where it was'
  )


def _is_terminal(number: int) -> bool:
  """Returns whether a file descriptor is a terminal."""
  try:
    return os.isatty(number)
  except OSError:
    return False
