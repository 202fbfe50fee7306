"""Parses what a model generates: reasoning, content, tool calls.

Works on token ids, one at a time. A mark such as </think> counts only as the
special token; text that spells it is text. Inside, a mark is one lone
surrogate: no decoded text holds such, so that strings can be searched.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.infer.detokenize import Stops
from deepseek_jax.infer.formats import pieces
from deepseek_jax.infer.formats.message import ToolCall

_FIRST = 0xD800  # of the lone surrogates
_NAMES = (
  pieces.BOS,
  pieces.EOS,
  pieces.SYSTEM,
  pieces.USER,
  pieces.ASSISTANT,
  pieces.REMINDER,
  pieces.THINK,
  pieces.END_THINK,
  pieces.DSML,
  '<｜tool▁calls▁begin｜>',
  '<｜tool▁calls▁end｜>',
  '<｜tool▁call▁begin｜>',
  '<｜tool▁call▁end｜>',
  '<｜tool▁sep｜>',
  '<｜tool▁outputs▁begin｜>',
  '<｜tool▁outputs▁end｜>',
  '<｜tool▁output▁begin｜>',
  '<｜tool▁output▁end｜>',
)
_SIGNS = {name: chr(_FIRST + n) for n, name in enumerate(_NAMES)}
_LONG = 256  # characters
_TELLS = re.compile('[>\ud800-\udfff]')  # ends a tag, or is a mark
_SPELLED = {ord(sign): name for name, sign in _SIGNS.items()}


def sign(name: str) -> str:
  """Returns the one character that stands for a mark."""
  return _SIGNS[name]


_THINK, _END_THINK = sign(pieces.THINK), sign(pieces.END_THINK)
_EOS = sign(pieces.EOS)


class Step(NamedTuple):
  """Holds what comes next in a block of calls.

  Attributes:
    kind: 'call', 'closed' (the block ends), 'open' (more is needed) or 'bad'.
    size: characters that were read.
    call: the call.
  """

  kind: str
  size: int = 0
  call: ToolCall | None = None


class Markup:
  """Reads a format's tool calls.

  Attributes:
    opens: what opens a block of calls.
  """

  opens: str = ''

  def next(self, held: str) -> Step:
    """Returns what stands at the start of a text inside a block."""
    raise NotImplementedError


class Delta(NamedTuple):
  """Holds what became certain: pieces of a message."""

  reasoning: str = ''
  content: str = ''
  tool_calls: tuple[ToolCall, ...] = ()


class Parsed(NamedTuple):
  """Holds a parsed answer. `finished`: its end-of-turn token came."""

  content: str
  reasoning_content: str
  tool_calls: tuple[ToolCall, ...]
  finished: bool

  def message(self) -> dict[str, Any]:
    """Returns it as an assistant's message, OpenAI-style, for the next turn."""
    out: dict[str, Any] = {'role': 'assistant', 'content': self.content}
    if self.reasoning_content:
      out['reasoning_content'] = self.reasoning_content
    if self.tool_calls:
      out['tool_calls'] = [call.message() for call in self.tool_calls]
    return out


class Parser:
  """Reads the tokens of an answer as they come; see `Format.parser`.

  Attributes:
    state: 'reasoning', 'content', 'calls' or 'ended'.
    stopped: whether a stop text ended the content.
    reasoning_tokens: how many tokens came while reasoning, its end included.
  """

  def __init__(
    self,
    tokenizer: Tokenizer | ByteTokenizer,
    marks: Sequence[str],
    markup: Markup | None,
    *,
    prompt: Sequence[int] = (),
    stop: Sequence[str] = (),
    ends: Sequence[int] = (),
    spell: bool = False,
  ):
    """Starts behind a prompt; arguments as of `Format.parser`."""
    ids = pieces.ids_of_marks(tokenizer, marks)
    self._signs = {i: sign(name) for name, i in ids.items()}
    self._signs |= {int(token): _EOS for token in ends}
    missing = [m for m in marks if m not in ids] if spell else []
    # Longer names first: one may begin another.
    missing.sort(key=len, reverse=True)
    self._missing = {name: sign(name) for name in missing}
    self._markup = markup
    self._stops, self._decoder = Stops(()), tokenizer.decoder()
    self._start('content', leading=False)
    self._enter(prompt)
    self._decoder = tokenizer.decoder(prompt)
    self._stops = Stops(stop)

  def _start(self, state: str, leading: bool) -> None:
    """Enters a state; `leading`: newlines at its start are dropped."""
    self.state, self._leading = state, leading
    self._held, self._text, self._block = '', '', ''
    self._said = False  # content other than blanks
    self._reasoning: list[str] = []
    self._content: list[str] = []
    self._calls: list[ToolCall] = []
    self.stopped, self.reasoning_tokens = False, 0

  def _enter(self, prompt: Sequence[int]) -> None:
    """Enters the state at a prompt's end, which lies behind its last mark."""
    ends = {_THINK, _END_THINK, sign(pieces.ASSISTANT)}
    ends.add(sign('<｜tool▁outputs▁end｜>'))
    signs = [self._signs.get(int(token)) for token in prompt]
    at = len(signs) - 1
    while at >= 0 and signs[at] not in ends:
      at -= 1
    if at < 0 and not self._missing:
      return
    at = 0 if self._missing else at
    for token, found in zip(prompt[at:], signs[at:]):
      self._take(found, int(token))
    self._take(None, None)
    held = self._held
    at = max(map(held.rfind, ends))
    if at < 0:
      self._start('content', leading=False)
      return
    state = 'reasoning' if held[at] == _THINK else 'content'
    self._start(state, leading=held[at] in (_THINK, _END_THINK))
    self._held = held[at + 1 :]
    self._advance(final=False)
    # The prompt's own text is no part of the answer, but for an open block.
    state, leading, block = self.state, self._leading, self._block
    held = self._held if state == 'calls' else ''
    self._start(state, leading)
    self._held, self._block = held, block

  def feed(self, token: int) -> Delta:
    """Returns what became certain with a token."""
    if self.state == 'ended':
      return Delta()
    self.reasoning_tokens += self.state == 'reasoning'
    before = len(self._held)
    self._take(self._signs.get(int(token)), int(token))
    if self._waits_for_more(before):
      return Delta()
    return self._advance(final=False)

  def _waits_for_more(self, before: int) -> bool:
    """Returns whether the text since `before` tells nothing new.

    Long arguments and endless newlines are not searched again at each token.
    """
    if before < _LONG:
      return False
    if self.state == 'calls':
      return not _TELLS.search(self._held, before)
    only = not self._held[before - _LONG :].strip('\n')
    return only and self._held[0] == '\n' and not self._leading

  def finish(self) -> Delta:
    """Returns what is left when no token follows."""
    if self.state == 'ended':
      return Delta()
    self._take(None, None)
    return self._advance(final=True)

  def parse(self, tokens: Sequence[int]) -> Parsed:
    """Returns the whole answer of all its tokens."""
    for token in tokens:
      self.feed(token)
    self.finish()
    return self.parsed

  @property
  def parsed(self) -> Parsed:
    """Returns all that became certain so far."""
    return Parsed(
      ''.join(self._content),
      ''.join(self._reasoning),
      tuple(self._calls),
      self.state == 'ended' and not self.stopped,
    )

  def _take(self, found: str | None, token: int | None) -> None:
    """Takes a token: a mark, text, or None for the end of all."""
    if found is None and token is not None:
      self._spell(self._decoder.feed(token))
      return
    self._spell(self._decoder.finish())
    # A mark or the end: what only began to spell a mark is text.
    self._held, self._text = self._held + self._text + (found or ''), ''

  def _spell(self, text: str) -> None:
    """Takes text, reading the marks that the tokenizer lacks from it."""
    self._text += text
    for name, found in self._missing.items():
      self._text = self._text.replace(name, found)
    waits = max((_overlap(self._text, n) for n in self._missing), default=0)
    at = len(self._text) - waits
    self._held, self._text = self._held + self._text[:at], self._text[at:]

  def _advance(self, final: bool) -> Delta:
    """Returns what the held text gives; at the end all of it."""
    reasoning, content, calls = [], [], []
    going = True
    while going:
      if self.state == 'reasoning':
        going, text = self._reason(final)
        reasoning.append(text)
      elif self.state == 'content':
        going, text = self._answer(final)
        content.append(text)
      elif self.state == 'calls':
        going, text, call = self._call(final)
        content.append(text)
        calls += [call] if call else []
      else:
        going = False
    return self._give(''.join(reasoning), ''.join(content), tuple(calls), final)

  def _give(
    self, reasoning: str, content: str, calls: tuple[ToolCall, ...], final: bool
  ) -> Delta:
    """Returns a delta up to a stop text, and adds it to the whole."""
    content = content.translate(_SPELLED)
    self._said |= not content.isspace() and content != ''
    if content or final:
      content = self._stops.feed(content)
    if self._stops.stopped:
      self.state, self.stopped, calls = 'ended', True, ()
    elif final or self.state == 'ended' or calls:
      content += self._stops.finish()
    calls = tuple(
      ToolCall(call.name, call.arguments, f'call_{len(self._calls) + n}')
      for n, call in enumerate(calls)
    )
    delta = Delta(reasoning.translate(_SPELLED), content, calls)
    self._reasoning.append(delta.reasoning)
    self._content.append(delta.content)
    self._calls += calls
    return delta

  def _reason(self, final: bool) -> tuple[bool, str]:
    """Returns (whether to go on, reasoning that is certain)."""
    self._drop_leading()
    at, found = self._first((_END_THINK, _EOS))
    text = self._held[:at]
    if found is None:
      return False, self._ready(final)
    self._held = self._held[at:]
    if found in (_END_THINK, _EOS):
      self._held = self._held[1:]
    if found == _END_THINK:
      self.state, self._leading = 'content', True
    else:
      self.state = 'ended' if found == _EOS else 'calls'
    # What comes before the end of reasoning ends without newlines.
    return True, text if found == _EOS else text.rstrip('\n')

  def _answer(self, final: bool) -> tuple[bool, str]:
    """Returns (whether to go on, content that is certain)."""
    self._drop_leading()
    at, found = self._first((_THINK, _END_THINK, _EOS))
    text = self._held[:at]
    if found is None:
      return False, self._ready(final)
    if found in (_END_THINK, _EOS, _THINK):
      self._held = self._held[at + 1 :]
    if found == _EOS:
      self.state = 'ended'
    elif found == _THINK:
      if text.strip() or self._said:
        self._said = True
        return True, text + _THINK  # in the middle it is no reasoning
      self.state, self._leading, text = 'reasoning', True, ''
    elif found != _END_THINK:
      self._held, self.state = self._held[at:], 'calls'
      self._block = ''
      text = text.rstrip('\n')
    return True, text

  def _call(self, final: bool) -> tuple[bool, str, ToolCall | None]:
    """Returns (whether to go on, text that is no call, a call)."""
    opens = self._markup.opens
    if self._held.startswith(opens) and not self._block:
      self._block, self._held = opens, self._held[len(opens) :]
    step = self._markup.next(self._held)
    ended = _EOS in self._held or final
    if step.kind == 'open' and not ended:
      return False, '', None
    if step.kind == 'call':
      self._block = 'called'
      self._held = self._held[step.size :]
      return True, '', step.call
    if step.kind == 'closed' and self._block == 'called':
      self._held = self._held[step.size :]
      self.state, self._leading = 'content', True
      return True, '', None
    # Not the format's markup: it is given as it came, and never lost.
    text = self._block if self._block != 'called' else ''
    at = self._held.find(_EOS)
    at = len(self._held) if at < 0 else at
    text, self._held = text + self._held[:at], self._held[at:]
    self.state, self._leading, self._block = 'content', False, ''
    return True, text if text.strip() else '', None

  def _first(self, marks: Sequence[str]) -> tuple[int, str | None]:
    """Returns (place, what) of the first mark or opened block of calls."""
    if self._markup is not None:
      marks = (*marks, self._markup.opens)
    found = [(at, m) for m in marks if (at := self._held.find(m)) >= 0]
    return min(found, default=(len(self._held), None))

  def _drop_leading(self) -> None:
    """Drops newlines at the start of reasoning or of content behind it."""
    if self._leading:
      self._held = self._held.lstrip('\n')
      self._leading = not self._held

  def _ready(self, final: bool) -> str:
    """Returns held text that no later token can change; keeps the rest."""
    held = self._held
    at = len(held)
    if not final:
      if self._markup is not None:
        at -= _overlap(held, self._markup.opens)
      if self._markup is not None or self.state == 'reasoning':
        # Newlines before a mark would be dropped.
        at = len(held[:at].rstrip('\n'))
    self._held = held[at:]
    return held[:at]


def _overlap(text: str, name: str) -> int:
  """Returns how many characters at the end of a text begin a name."""
  sizes = range(min(len(text), len(name) - 1), 0, -1)
  return next((n for n in sizes if text.endswith(name[:n])), 0)
