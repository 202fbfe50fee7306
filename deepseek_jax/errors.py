"""The error that a user can mend.

Launchers print its one line and exit with status 2; anything else is a defect
and keeps its traceback.
"""


class InputError(ValueError):
  """What the user gave is wrong: names the field, the value and the fix."""


class RunAborted(RuntimeError):
  """A run gave up; launchers print the one line and exit with `status`."""

  status = 78


class Preempted(RuntimeError):
  """A run was asked to end and has saved; started again, it goes on."""

  status = 77
