"""Writes and reads tool calls as DeepSeek's markup language (V3.2, V4, V4.1).

A text parameter stands as it is, all others as JSON:

    <｜DSML｜invoke name="weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.infer.formats.base import Format
from deepseek_jax.infer.formats.message import Message, ToolCall, to_json
from deepseek_jax.infer.formats.parse import Markup, Step, sign
from deepseek_jax.infer.formats.pieces import (
  DSML,
  END_THINK,
  EOS,
  Piece,
  mark,
  spelled,
)


class DsmlFormat(Format):
  """Writes answers as the formats with this markup do."""

  def _answer(
    self, message: Message, thinking: bool, prompt: list[Piece]
  ) -> list[Piece]:
    """Returns what a model generates for a turn, behind its prompt."""
    out = []
    if thinking:
      out.append(Piece(message.reasoning))
      if message.prefix and not message.content:
        return out
      out.append(mark(END_THINK))
    out.append(Piece(message.content))
    out += self.markup.write(message.tool_calls)
    return out if message.prefix else [*out, mark(EOS)]


class Dsml(Markup):
  """Writes and reads blocks of calls.

  Attributes:
    opens: the tag of a block, without its brackets.
  """

  def __init__(
    self,
    block: str,
    blank: str = '',
    empty: str = '',
    to_json: Callable[[Any], str] = to_json,
  ):
    """Takes the words in which versions differ.

    Args:
      block: name of the tag around all calls.
      blank: stands between the mark and the name of a tag.
      empty: stands for the parameters of a call without any.
      to_json: writes values that are no text.
    """
    self._block, self._blank, self._empty = block, blank, empty
    self._to_json = to_json
    found = sign(DSML)
    self.opens = f'<{found}{blank}{block}>'
    self._closes = f'</{found}{blank}{block}>'
    self._ends_call = f'</{found}{blank}invoke>'
    value = f'(?P<value>(?:(?!</{found}).)*)'
    tag = f'{found}{blank}parameter'
    self._parameter = re.compile(
      rf'<{tag} name="(?P<key>[^"]*)" string="(?P<text>true|false)">'
      rf'{value}</{tag}>\s*',
      re.DOTALL,
    )
    self._invoke = re.compile(rf'\s*<{found}{blank}invoke name="([^"]+)">\s*')

  def opening(self) -> list[Piece]:
    """Returns what opens a block, for a prompt whose answer must call."""
    return spelled(f'\n\n{self._tag("", self._block)}\n', DSML)

  def write(self, calls: Sequence[ToolCall]) -> list[Piece]:
    """Returns a block of calls; nothing if there are none."""
    if not calls:
      return []
    out = self.opening()
    for call in calls:
      # Names and keys are a caller's text: marks that they spell stay text.
      out += [Piece('<'), mark(DSML)]
      out.append(Piece(f'{self._blank}invoke name="{call.name}">\n'))
      out += self._parameters(call)
      out += spelled(self._tag('/', 'invoke') + '\n', DSML)
    return out + spelled(self._tag('/', self._block), DSML)

  def _tag(self, slash: str, word: str) -> str:
    """Returns a tag as text, the mark by name."""
    return f'<{slash}{DSML}{self._blank}{word}>'

  def _parameters(self, call: ToolCall) -> list[Piece]:
    """Returns the parameters of a call."""
    out: list[Piece] = []
    for key, is_text, value in self._arguments(call.arguments):
      out += [
        Piece('<'),
        mark(DSML),
        Piece(f'{self._blank}parameter name="{key}"'),
        Piece(f' string="{str(is_text).lower()}">'),
        Piece(value),
        *spelled(self._tag('/', 'parameter') + '\n', DSML),
      ]
    return out or [Piece(self._empty)]

  def _arguments(self, text: str) -> list[tuple[str, bool, str]]:
    """Returns (key, whether it is a text, value) of each argument.

    What is no JSON object is one argument, a text.
    """
    try:
      found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
      if isinstance(found, dict):
        return [
          (key, True, value)
          if isinstance(value, str)
          else (key, False, self._to_json(value))
          for key, value in found.items()
        ]
    except (ValueError, RecursionError):
      pass
    return [('arguments', True, text)]

  def next(self, held: str) -> Step:
    """Reads one call, or the end of the block, from the start of a text."""
    rest = held.lstrip()
    if self._closes.startswith(rest[: len(self._closes)]):
      if rest.startswith(self._closes):
        return Step('closed', len(held) - len(rest) + len(self._closes))
      return Step('open')
    end = held.find(self._ends_call)
    if end < 0:
      closed = self._closes in held
      return Step('bad' if closed or not self._may_begin(held) else 'open')
    end += len(self._ends_call)
    call = self._call(held[:end])
    return Step('call', end, call) if call else Step('bad')

  def _may_begin(self, held: str) -> bool:
    """Returns whether a text may go on as a call."""
    start = f'<{sign(DSML)}{self._blank}invoke name="'
    rest = held.lstrip()
    return start.startswith(rest[: len(start)])

  def _call(self, text: str) -> ToolCall | None:
    """Returns the call that a text is, or None."""
    begin = self._invoke.match(text)
    if begin is None:
      return None
    at, found = begin.end(), {}
    while parameter := self._parameter.match(text, at):
      if parameter['key'] in found:
        return None
      value = parameter['value']
      is_text = parameter['text'] == 'true'
      found[parameter['key']] = to_json(value) if is_text else value
      at = parameter.end()
    if text[at:] != self._ends_call:
      return None
    fields = ', '.join(f'{to_json(k)}: {v}' for k, v in found.items())
    return ToolCall(begin[1], f'{{{fields}}}')


def _refuse(name: str) -> None:
  """Raises ValueError: NaN and Infinity are no JSON."""
  raise ValueError(name)


def _finite(text: str) -> float:
  """Returns a number; ValueError if it is too large for one."""
  if math.isinf(value := float(text)):
    raise ValueError(text)
  return value
