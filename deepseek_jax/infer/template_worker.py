"""Renders chat templates: the child process of `deepseek_jax.infer.template`.

A template is a program that came with a download. It runs in jinja2's
immutable sandbox, in a process that has nothing to lose and may be killed. The
environment equals that of transformers' apply_chat_template; this file imports
jinja2 and the standard library only, so that the process starts fast.

A request is a marshalled (template, variables, CPU seconds, MiB, characters)
and an answer a JSON [text, error], each behind its length in 4 bytes.
"""

import datetime
import functools
import json
import marshal
import math
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import ext, nodes, sandbox


class _Generation(ext.Extension):
  """Reads {% generation %}, which marks what the assistant wrote.

  Training masks follow the mark; the text is that of the block.
  """

  tags = frozenset({'generation'})

  def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
    """Returns the block as a call of `_text` on its body."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    # A call block, as in transformers: what it sets is not visible outside.
    block = nodes.CallBlock(self.call_method('_text'), [], [], body)
    return block.set_lineno(line)

  def _text(self, caller: Callable[[], str]) -> str:
    """Returns the text of the block, unchanged."""
    return caller()


class _Dict:
  """Stands for `dict` without its attributes."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict:
    """Returns a dict of the arguments."""
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
    """Returns dict.fromkeys of the arguments."""
    return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
  """Refuses the names that lead to Python's internals."""

  def __init__(*args: Any, **kwargs: Any):
    """Raises SecurityError for a name that begins with an underscore."""
    # No parameter is named: a template may name an attribute 'self'.
    self, *args = args
    attributes = dict(*args, **kwargs)
    for name in attributes:
      _public(name)
    jinja2.utils.Namespace.__init__(self, attributes)

  def __setitem__(self, name: str, value: Any) -> None:
    """Sets an attribute; SecurityError for one with an underscore first."""
    _public(name)
    super().__setitem__(name, value)


def _public(name: Any) -> None:
  """Raises SecurityError for a name that begins with an underscore."""
  if isinstance(name, str) and name.startswith('_'):
    raise jinja2.exceptions.SecurityError(
      f'a namespace takes no attribute named {name!r}'
    )


def _raise_exception(message: Any) -> NoReturn:
  """Raises TemplateError, by which a template refuses its messages."""
  raise jinja2.TemplateError(str(message))


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | str | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """Returns a value as JSON text that is not escaped for HTML."""
  # jinja2's own filter escapes what HTML would misread.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def environment() -> sandbox.ImmutableSandboxedEnvironment:
  """Returns the environment that published templates are written for."""
  out = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
  )
  out.filters['tojson'] = _to_json
  out.globals['raise_exception'] = _raise_exception
  out.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(
    form
  )
  out.globals['dict'] = _Dict()
  out.globals['namespace'] = _Namespace
  return out


def words(error: BaseException) -> str:
  """Returns one line that says what went wrong; never an empty one."""
  text = str(error)
  if isinstance(error, jinja2.TemplateSyntaxError):
    text = f'line {error.lineno}: {error.message}'
  elif not text or not isinstance(error, jinja2.TemplateError):
    text = f'{type(error).__name__}: {text}'.removesuffix(': ')
  line = ' '.join(text.split())
  # What a template raises reaches a terminal: no control characters.
  return ''.join(c if c.isprintable() else '\ufffd' for c in line)[:500]


def _limit(seconds: int, mebibytes: int, base: int) -> None:
  """Limits the CPU time from now on and the memory above `base` bytes."""
  try:
    import resource
  except ImportError:  # not on this system: the parent's clock still holds
    return
  until = math.ceil(time.process_time() + seconds)
  for what, most in (
    (resource.RLIMIT_CPU, until),
    (resource.RLIMIT_AS, base + (mebibytes << 20)),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_FSIZE, 0),  # it writes no file
  ):
    try:
      hard = resource.getrlimit(what)[1]
      if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
      resource.setrlimit(what, (most, hard))
    except (ValueError, OSError):  # as on macOS for memory
      continue


def _address_space() -> int:
  """Returns the bytes of address space in use, 1 GiB where unknown."""
  try:
    import resource

    with open('/proc/self/statm', encoding='ascii') as file:
      return int(file.read().split()[0]) * resource.getpagesize()
  except (OSError, ImportError):
    return 1 << 30


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
  """Returns a compiled template; the last few are kept."""
  return environment().from_string(template)


def answer(template: str, variables: dict[str, Any], most: int) -> list:
  """Returns [text, None] or [None, what went wrong]."""
  try:
    text = _compiled(template).render(variables)
    if len(text) > most:
      return [None, f'a text of {len(text)} characters; at most {most}']
    return [text, None]
  except MemoryError:
    return [None, 'memory']
  except Exception as error:  # a foreign program may fail in any way
    return [None, words(error)]


def _read(stream: BinaryIO, count: int) -> bytes:
  """Returns `count` bytes; ends this process if the parent has gone."""
  out = stream.read(count)
  if len(out) < count:
    raise SystemExit  # the parent has gone
  return out


def main() -> None:
  """Answers requests until the input ends."""
  import signal

  # Ctrl-C is for the parent, which then ends this process.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  source, sink = sys.stdin.buffer, sys.stdout.buffer
  environment().from_string('{{ 1 }}').render()  # imports the rest
  base = _address_space()
  reply: list = ['ready', None]
  while True:
    body = json.dumps(reply).encode('ascii')
    sink.write(struct.pack('<I', len(body)) + body)
    sink.flush()
    (size,) = struct.unpack('<I', _read(source, 4))
    template, variables, seconds, mebibytes, most = marshal.loads(
      _read(source, size)
    )
    # Anew for each request: the limit counts from the start of the process.
    _limit(seconds, mebibytes, base)
    reply = answer(template, variables, most)


if __name__ == '__main__':
  main()
