"""Says what a server and the terminal need to know of a chat format.

The formats themselves are in `deepseek_jax.infer.formats`; this is all that is
asked of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Chat:
  """Holds a conversation that an answer is asked for.

  Attributes:
    messages: {'role', 'content', ...} each, as checked.
    tools: functions that may be called, as the request has them.
    tool_choice: 'auto', 'required' or 'function'.
    function: that must be called, if the choice names one.
    thinking: None: as the format does by itself.
    effort: how much to think; None: as the format does by itself.
    form: response_format as the request has it, for formats that tell the
      model about it.
  """

  messages: tuple[Mapping[str, Any], ...]
  tools: tuple[Mapping[str, Any], ...] = ()
  tool_choice: str = 'auto'
  function: str | None = None
  thinking: bool | None = None
  effort: str | None = None
  form: Mapping[str, Any] | None = None


class Call(Protocol):
  """Holds a call of a function."""

  name: str
  arguments: str  # JSON, as it was generated


class Delta(Protocol):
  """Holds what became certain of an answer."""

  reasoning: str
  content: str
  tool_calls: Sequence[Call]


class AnswerParser(Protocol):
  """Takes an answer apart as its tokens come.

  Attributes:
    state: what the next token is part of: 'reasoning', 'content', 'calls', or
      'ended'.
    stopped: whether a stop text ended the content.
    reasoning_tokens: so far.
  """

  state: str
  stopped: bool
  reasoning_tokens: int

  def feed(self, token: int) -> Delta:
    """Returns what is certain with this token."""

  def finish(self) -> Delta:
    """Returns what is left when no token follows."""


class Dialect(Protocol):
  """Writes conversations as a model was trained on, and reads its answers.

  Attributes:
    name: of the format.
    end_of_thinking: the token that ends reasoning; None: it never reasons.
    calls: whether tools may be given.
  """

  name: str
  end_of_thinking: int | None
  calls: bool

  def encode(self, chat: Chat) -> list[int]:
    """Returns the prompt's tokens; InputError if it cannot be written."""

  def parser(
    self, chat: Chat, prompt: Sequence[int], stops: Sequence[str]
  ) -> AnswerParser:
    """Returns what reads the answer to a prompt, up to a stop text."""
