"""Describes a server: where it listens, who may ask, how much."""

import dataclasses
import hashlib
import hmac
import ipaddress
import os

from deepseek_jax.errors import InputError

KEY_VARIABLE = 'DEEPSEEK_JAX_API_KEY'
_LEAST_KEY = 16  # characters
_MOST_KEYS = 1 << 16  # bytes of a file of keys


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds what a request may ask for and what the server holds.

  Attributes:
    body: bytes of a request.
    body_seconds: to send it.
    header_seconds: to send what is before it.
    messages: of a conversation.
    prompts: of one request for completions.
    new_tokens: that an answer may have.
    answers: to one prompt (n).
    scores: log-probabilities of prompts (echo) in one response.
    stops: texts that end an answer.
    stop_length: characters of one of them.
    biases: tokens in logit_bias.
    top_logprobs: likeliest tokens beside each.
    tools: functions that a model may call.
    schema: characters of a schema or grammar.
    schema_depth: objects and lists inside each other in it.
    requests: under way at a time, those that wait included.
    held: pieces of a stream that wait for a slow reader.
    unread_seconds: for which a client may read nothing of its stream.
    seconds: for one request; 0: no limit.
  """

  body: int = 4 << 20
  body_seconds: float = 30.0
  header_seconds: float = 10.0
  messages: int = 1024
  prompts: int = 256
  new_tokens: int = 32_768
  answers: int = 8
  scores: int = 1 << 19
  stops: int = 16
  stop_length: int = 256
  biases: int = 300
  top_logprobs: int = 20
  tools: int = 128
  schema: int = 1 << 16
  schema_depth: int = 32
  requests: int = 256
  held: int = 4096
  unread_seconds: float = 30.0
  seconds: float = 600.0

  def __post_init__(self) -> None:
    """Raises InputError for a limit that lets nothing through."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      kinds = (int,) if isinstance(field.default, int) else (int, float)
      least = 0 if field.name == 'seconds' else 1 if kinds == (int,) else 1e-3
      if type(value) not in kinds or not least <= value < 1 << 31:
        raise InputError(
          f'limits.{field.name} = {value!r}: must be'
          f' {"a whole number" if kinds == (int,) else "a number"} of at least'
          f' {least}, below 2^31'
        )


@dataclasses.dataclass(frozen=True)
class ServeConfig:
  """Says where a server listens and who may ask.

  Attributes:
    host: address; one that other machines reach needs a key.
    port: 0 takes a free one.
    keys: any of them opens the server; () leaves it open to this machine.
    hosts: more names that a browser may call the server by.
    origins: pages of other servers that may ask, as 'https://host:port'.
    limits: how much.
  """

  host: str = '127.0.0.1'
  port: int = 8000
  keys: tuple[str, ...] = ()
  hosts: tuple[str, ...] = ()
  origins: tuple[str, ...] = ()
  limits: Limits = Limits()

  def __post_init__(self) -> None:
    """Raises InputError for what would leave a server open."""
    if type(self.port) is not int or not 0 <= self.port < 1 << 16:
      raise InputError(f'--port={self.port}: must be from 0 to 65535')
    if not self.keys and not is_loopback(self.host):
      raise InputError(
        f'--host={self.host}: other machines reach it, so it needs a key: set'
        f' {KEY_VARIABLE} or give --api_key_file=FILE'
      )
    for key in self.keys:
      check_key(key)
    for origin in self.origins:
      scheme, mark, rest = origin.partition('://')
      if scheme not in ('http', 'https') or not mark or not rest.strip('*/'):
        raise InputError(
          f'--allow_origin={origin}: write one as https://host:port; no * is'
          ' taken, as any page could then ask'
        )


def is_loopback(host: str) -> bool:
  """Returns whether an address is reached from this machine alone."""
  if host == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host.strip('[]')).is_loopback
  except ValueError:
    return False


def check_key(key: str) -> None:
  """Raises InputError for a key that is short or cannot be sent."""
  if len(key) < _LEAST_KEY or not all('!' <= c <= '~' for c in key):
    raise InputError(
      f'a key has {len(key)} characters: it must have at least {_LEAST_KEY},'
      ' all printable ASCII without blanks; `openssl rand -hex 32` makes one'
    )


def read_keys(path: str | None) -> tuple[str, ...]:
  """Returns the keys of a file, one a line, else that of the environment.

  Raises:
    InputError: the file cannot be read or holds none; or a key is too short.
  """
  if path is None:
    keys = [os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else []
  else:
    try:
      with open(os.path.expanduser(path), encoding='utf-8') as file:
        lines = file.read(_MOST_KEYS).splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f'--api_key_file={path}: {error}') from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
      raise InputError(f'--api_key_file={path}: holds no key; write one a line')
  for key in keys:
    check_key(key)
  return tuple(keys)


def key_of(given: bytes, keys: tuple[str, ...]) -> str | None:
  """Returns which key was given, by a name that does not tell it, or None.

  Takes as long for any wrong one: hashes are compared, all of them.
  """
  digest = hashlib.sha256(given).digest()
  found = None
  for key in keys:
    if hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()):
      found = hashlib.sha256(b'salt ' + key.encode()).hexdigest()[:16]
  return found
