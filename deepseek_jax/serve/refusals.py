"""Defines the errors that a client gets, in the shape that OpenAI's have.

`{"error": {"message", "type", "param", "code"}}`, after which clients choose
their exception and show its one line.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError

# Clients of OpenAI's make a request again after these, unless they are told
# not to: a long answer would be computed three times.
_ONCE = {'x-should-retry': 'false'}


class ApiError(Exception):
  """Answers a request with an error."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    kind: str = 'invalid_request_error',
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    """Takes what the client is told.

    Args:
      status: of HTTP.
      message: one line that names the field, the value and the fix.
      kind: OpenAI's `type`.
      param: the field that is wrong.
      code: a word for programs.
      headers: more for the response.
    """
    message = ' '.join(message.split())  # names in it may hold anything
    super().__init__(message)
    self.status, self.message = status, message
    self.kind, self.param, self.code = kind, param, code
    self.headers = dict(headers or {})

  def body(self) -> dict[str, Any]:
    """Returns the JSON of the response."""
    return {
      'error': {
        'message': self.message,
        'type': self.kind,
        'param': self.param,
        'code': self.code,
      }
    }


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
  """Returns the error of a field: `param: message`."""
  return ApiError(400, f'{param}: {message}', param=param, code=code)


def refused(error: InputError, param: str | None = None) -> ApiError:
  """Returns what a client is told when the engine refuses its request."""
  return ApiError(400, str(error), param=param)


def busy(message: str, seconds: int = 1) -> ApiError:
  """Returns the error of a full queue, with when to come again."""
  return ApiError(
    429,
    message,
    kind='rate_limit_error',
    code='queue_full',
    headers={'retry-after': str(seconds)},
  )


def broken(message: str) -> ApiError:
  """Returns the error of a request that failed here, not at the client's."""
  return ApiError(
    500,
    message,
    kind='server_error',
    code='generation_failed',
    headers=_ONCE,
  )


def late(seconds: float) -> ApiError:
  """Returns the error of a request that took longer than the deadline."""
  return ApiError(
    504,
    f'the answer was not complete after {seconds:g} s, which is the limit of'
    ' this server: ask for fewer tokens',
    kind='server_error',
    code='deadline_exceeded',
    headers=_ONCE,
  )


def slow() -> ApiError:
  """Returns the error of a stream that is read too slowly."""
  return ApiError(
    500,
    'the stream was read more slowly than it was made; it was ended',
    kind='server_error',
    code='slow_reader',
  )


def not_ready(state: str) -> ApiError:
  """Returns the error of a server that cannot answer now."""
  return ApiError(
    503,
    f'the engine is {state}; /ready says when it answers',
    kind='server_error',
    code='not_ready',
    headers={'retry-after': '5'},
  )
