"""Turns the tokens of a request into text as they come, up to a stop text.

Text is given as soon as no later token can change or cut it: a character split
over tokens waits until it is whole, and an end that may begin a stop text
waits until it does not.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.request import Request


class Stops:
  """Cuts a text before the first stop text that it contains.

  The first is the one that is complete first, whatever pieces the text comes
  in; of two that are complete together, the longer. The time is linear in the
  text (Knuth, Morris and Pratt).

  Attributes:
    stopped: whether one was found; all that follows is dropped.
  """

  def __init__(self, stops: Sequence[str]):
    """Takes the stop texts; InputError for an empty one."""
    if isinstance(stops, str) or not all(isinstance(s, str) for s in stops):
      raise InputError(f'stop = {stops!r}: must be a list of texts')
    if '' in stops:
      raise InputError("stop = '': name the text to end before")
    self._stops = [(stop, _borders(stop)) for stop in stops]
    self._states = [0] * len(self._stops)  # characters matched of each
    self._held = ''
    self.stopped = False

  def feed(self, text: str) -> str:
    """Returns the text that is certain to come before any stop text."""
    if self.stopped:
      return ''
    if not self._stops:
      return text
    held = self._held + text
    for at, letter in enumerate(text, len(self._held) + 1):
      if size := self._matched(letter):
        self._held, self.stopped = '', True
        return held[: at - size]
    ready = len(held) - max(self._states)
    self._held = held[ready:]
    return held[:ready]

  def _matched(self, letter: str) -> int:
    """Returns the length of the longest stop text that a letter completes."""
    longest = 0
    for n, (stop, borders) in enumerate(self._stops):
      state = self._states[n]
      while state and stop[state] != letter:
        state = borders[state - 1]
      state += stop[state] == letter
      if state == len(stop):
        longest = max(longest, state)
        state = borders[state - 1]
      self._states[n] = state
    return longest

  def finish(self) -> str:
    """Returns what was held back when no text follows; starts anew."""
    held, self._held = self._held, ''
    self._states = [0] * len(self._stops)
    return held


def _borders(stop: str) -> list[int]:
  """Returns, of each beginning, how long its longest end is that begins it."""
  out, size = [0] * len(stop), 0
  for at in range(1, len(stop)):
    while size and stop[at] != stop[size]:
      size = out[size - 1]
    size += stop[at] == stop[size]
    out[at] = size
  return out


class Delta(NamedTuple):
  """Holds text that became certain.

  Attributes:
    text: new text.
    tokens: tokens whose text ends in it, in order. Over a stream each token
      comes once; those that a stop text cut come with the last.
  """

  text: str
  tokens: tuple[int, ...]


class Detokenizer:
  """Decodes the tokens of one request.

  Attributes:
    stopped: whether a stop text ended it.
  """

  def __init__(
    self,
    tokenizer: Tokenizer | ByteTokenizer,
    *,
    after: Sequence[int] = (),
    stop: Sequence[str] = (),
  ):
    """Starts behind the tokens of `after`, whose text isn't given.

    Args:
      tokenizer: with decoder(after).
      after: such as a prompt; matters where a token's text depends on those
        before it.
      stop: the text ends before the first of these.
    """
    self._decoder = tokenizer.decoder(after)
    self._stops = Stops(stop)
    self._open: list[int] = []  # their last character isn't whole
    self._waiting: deque[tuple[int, int]] = deque()  # token, end of its text
    self._decoded = self._given = 0  # characters

  @property
  def stopped(self) -> bool:
    """Returns whether a stop text ended the text."""
    return self._stops.stopped

  def feed(self, token: int) -> Delta:
    """Returns what became certain with a token."""
    if self.stopped:
      return Delta('', ())
    self._open.append(int(token))
    text = self._decoder.feed(int(token))
    self._decoded += len(text)
    if not self._decoder.pending:
      self._close()
    return self._give(self._stops.feed(text), final=False)

  def finish(self) -> Delta:
    """Returns what is left when no token follows."""
    if self.stopped:
      return Delta('', ())
    text = self._decoder.finish()
    self._decoded += len(text)
    self._close()
    text = self._stops.feed(text)
    return self._give(text + self._stops.finish(), final=True)

  def _close(self) -> None:
    """Notes where the text of the open tokens ends."""
    self._waiting.extend((token, self._decoded) for token in self._open)
    self._open = []

  def _give(self, text: str, final: bool) -> Delta:
    """Returns a text with the tokens whose text has been given with it."""
    self._given += len(text)
    if self.stopped or final:
      self._close()
      self._given = self._decoded
    out = []
    while self._waiting and self._waiting[0][1] <= self._given:
      out.append(self._waiting.popleft()[0])
    return Delta(text, tuple(out))


def following(
  tokenizer: Tokenizer | ByteTokenizer | None, request: Request
) -> Detokenizer | None:
  """Returns what makes text of a request's tokens; None without tokenizer."""
  if tokenizer is None:
    return None
  return Detokenizer(tokenizer, after=request.prompt, stop=request.stop_strings)
