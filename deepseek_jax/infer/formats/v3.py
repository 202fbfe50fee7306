"""Renders the chat formats of DeepSeek-V3 and DeepSeek-R1.

They share the published template: system messages come first, earlier answers
lose what stands before their </think>. R1's prompt opens the reasoning. Two
oddities of the template are kept: only the first turn with calls opens a block
(later ones lose their content), and only the first result opens one of results.
"""

import re

from deepseek_jax.infer.formats.base import Format
from deepseek_jax.infer.formats.message import Message, Talk, ToolCall
from deepseek_jax.infer.formats.parse import Markup, Step, sign
from deepseek_jax.infer.formats.pieces import (
  ASSISTANT,
  BOS,
  END_THINK,
  EOS,
  THINK,
  USER,
  Piece,
  mark,
)

_CALLS, _END_CALLS = '<｜tool▁calls▁begin｜>', '<｜tool▁calls▁end｜>'
_CALL, _END_CALL = '<｜tool▁call▁begin｜>', '<｜tool▁call▁end｜>'
_SEP = '<｜tool▁sep｜>'
_OUTPUTS, _END_OUTPUTS = '<｜tool▁outputs▁begin｜>', '<｜tool▁outputs▁end｜>'
_OUTPUT, _END_OUTPUT = '<｜tool▁output▁begin｜>', '<｜tool▁output▁end｜>'


class Calls(Markup):
  """Writes and reads calls: a kind, a name, and arguments as fenced JSON."""

  opens = sign(_CALLS)
  _CALL = re.compile(
    rf'\s*{sign(_CALL)}\w*{sign(_SEP)}([^\n]+)\n```json\n(.*?)\n```\s*',
    re.DOTALL,
  )

  def write(self, call: ToolCall) -> list[Piece]:
    """Returns one call."""
    return [
      mark(_CALL),
      Piece('function'),
      mark(_SEP),
      Piece(f'{call.name}\n```json\n{call.arguments}\n```'),
      mark(_END_CALL),
    ]

  def write_all(self, calls: tuple[ToolCall, ...]) -> list[Piece]:
    """Returns a block of calls."""
    out = [mark(_CALLS)]
    for n, call in enumerate(calls):
      out += [Piece('\n' if n else ''), *self.write(call)]
    return [*out, mark(_END_CALLS)]

  def next(self, held: str) -> Step:
    """Reads one call, or the end of the block, from the start of a text."""
    rest = held.lstrip()
    if not rest:
      return Step('open')
    if rest[0] == sign(_END_CALLS):
      return Step('closed', len(held) - len(rest) + 1)
    if rest[0] != sign(_CALL):
      return Step('bad')
    end = held.find(sign(_END_CALL))
    if end < 0:
      return Step('bad' if sign(_END_CALLS) in held else 'open')
    found = self._CALL.fullmatch(held, 0, end)
    if found is None:
      return Step('bad')
    return Step('call', end + 1, ToolCall(found[1], found[2]))


class V3(Format):
  """Renders for DeepSeek-V3: thinks only if asked to."""

  name = 'v3'
  thinks = False
  tools = answers = False
  markup = Calls()
  marks = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, _CALLS, _END_CALLS)
  marks += (_CALL, _END_CALL, _SEP, _OUTPUTS, _END_OUTPUTS, _OUTPUT)
  marks += (_END_OUTPUT,)

  def _render(self, talk: Talk, generation: bool) -> list[Piece]:
    """Returns the pieces of a conversation."""
    systems = [m.content for m in talk.messages if m.role == 'system']
    out = [mark(BOS), Piece('\n\n'.join(systems))]
    after_tool = called = answered = False
    for message in talk.messages:
      if message.role == 'user':
        out += [mark(USER), Piece(message.content)]
        after_tool = False
      elif message.role == 'tool':
        out += [] if answered else [mark(_OUTPUTS)]
        out += [mark(_OUTPUT), Piece(message.content), mark(_END_OUTPUT)]
        after_tool = answered = True
      elif message.tool_calls:
        out += self._calls(message, called)
        called, after_tool = True, False
      elif message.role == 'assistant':
        opening = [mark(_END_OUTPUTS)] if after_tool else self._open(talk)
        if message.prefix:
          out += [*opening, *self._answer(message, talk.thinking, opening)]
          return out
        content = message.content
        if not after_tool:
          opening = [mark(ASSISTANT)]
          content = content.split(END_THINK)[-1]
        out += [*opening, Piece(content), mark(EOS)]
        after_tool = False
    if after_tool:
      return [*out, mark(_END_OUTPUTS)]
    return [*out, *self._open(talk)] if generation else out

  def _open(self, talk: Talk) -> list[Piece]:
    """Returns what opens an answer."""
    if not talk.thinking:
      return [mark(ASSISTANT)]
    return [mark(ASSISTANT), mark(THINK), Piece('\n')]

  def _calls(self, message: Message, called: bool) -> list[Piece]:
    """Returns a turn with calls, as the template shows it later."""
    out = []
    for call in message.tool_calls:
      if called:
        out.append(Piece('\n'))
      else:
        out += [mark(ASSISTANT), Piece(message.content), mark(_CALLS)]
      out += self.markup.write(call)
      called = True
    return [*out, mark(_END_CALLS), mark(EOS)]

  def _split(self, message: Message) -> tuple[str, str]:
    """Returns (reasoning, content); the content may hold both."""
    before, found, after = message.content.rpartition(END_THINK)
    if message.reasoning or not found:
      return message.reasoning, message.content
    before = before.removeprefix(THINK)
    return before.strip('\n'), after.lstrip('\n')

  def _reasoning(self, message: Message) -> str:
    """Returns what an assistant thought."""
    return self._split(message)[0]

  def _answer(
    self, message: Message, thinking: bool, prompt: list[Piece]
  ) -> list[Piece]:
    """Returns what a model generates for a turn, behind its prompt."""
    reasoning, content = self._split(message)
    out = []
    if thinking:
      # The prompt after a tool's result doesn't open the reasoning.
      opened = mark(THINK) in prompt[-2:]
      if opened or reasoning:
        out += [] if opened else [mark(THINK), Piece('\n')]
        out.append(Piece(reasoning))
        if message.prefix and not content:
          return out
        out += [Piece('\n'), mark(END_THINK), Piece('\n\n')]
    out.append(Piece(content))
    if message.tool_calls:
      out += self.markup.write_all(message.tool_calls)
    return out if message.prefix else [*out, mark(EOS)]


class R1(V3):
  """Renders for DeepSeek-R1: the prompt opens the reasoning."""

  name = 'r1'
  thinks = True
