"""Describes what chat formats have in common: options, turns, the way back."""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.formats import parse
from deepseek_jax.infer.formats.message import (
  EFFORTS,
  Message,
  Talk,
  read,
  read_answer,
  read_tools,
  shown,
)
from deepseek_jax.infer.formats.pieces import Piece, joined, text_of

Turn = tuple[list[Piece], list[Piece]]  # prompt, answer


class Format:
  """Renders conversations as a model was trained on them.

  Attributes:
    name: in the registry.
    thinks: whether it thinks unless told otherwise.
    efforts: words for how much it thinks; none if the format has no such.
    tools: whether it describes tools.
    answers: whether it describes the form of an answer.
    roles: of messages that it renders.
    marks: the special tokens that it uses.
    markup: of tool calls.
  """

  name: str
  thinks: bool
  efforts: tuple[str, ...] = ()
  tools = True
  answers = True
  roles: tuple[str, ...] = ('system', 'user', 'assistant', 'tool')
  marks: tuple[str, ...]
  markup: parse.Markup

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    generation: bool = True,
    **options: Any,
  ) -> list[Piece]:
    """Returns messages as pieces of text and marks.

    Args:
      messages: OpenAI-style, [{'role': 'user', 'content': 'Hi'}, ...]. The last
        assistant's may have prefix=True: it is then left open.
      generation: end with what opens the assistant's answer.
      **options: of `read`.

    Raises:
      InputError: names the field that is wrong or that no format can render.
    """
    talk = self.read(messages, **options)
    if generation and talk.messages[-1].tool_calls:
      raise InputError(
        'messages: the last tool_calls have no result yet: give a message of'
        ' role tool for each'
      )
    return joined(self._render(talk, generation))

  def read(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: Any = None,
    thinking: bool | None = None,
    effort: str | None = None,
    response_format: Any = None,
  ) -> Talk:
    """Returns a checked conversation.

    Args:
      messages: see `render`.
      tools: functions that may be called, OpenAI-style.
      tool_choice: 'auto', 'none' (as without tools), or 'required'.
      thinking: whether to think; None for the format's own way.
      effort: 'none' (don't think), 'low', 'high', 'max' and OpenAI's words.
      response_format: OpenAI-style; json_object or json_schema.
    """
    found = read_tools(tools)
    if tool_choice == 'none':
      found = ()
    required = tool_choice == 'required' or isinstance(tool_choice, Mapping)
    if not required and tool_choice not in (None, 'auto', 'none'):
      raise InputError(
        f'tool_choice = {shown(tool_choice)}: must be auto, none, required or a'
        ' function'
      )
    if effort is not None and effort not in tuple(EFFORTS):
      raise InputError(
        f'effort = {shown(effort)}: must be one of {", ".join(EFFORTS)}'
      )
    effort = EFFORTS.get(effort)
    if effort == 'none':
      thinking, effort = False, None
    answer = read_answer(response_format)
    self._check(found, effort, answer, required)
    thinking = self.thinks if thinking is None else bool(thinking)
    if required and (thinking or not found):
      raise InputError(
        f'tool_choice = {shown(tool_choice)}: needs tools, and thinking off'
      )
    talk = Talk(read(messages), found, thinking, effort, answer, required)
    if required and talk.messages[-1].prefix:
      raise InputError('tool_choice: a message with prefix makes no call')
    self._check_messages(talk.messages)
    return talk

  def _check_messages(self, messages: tuple[Message, ...]) -> None:
    """Raises InputError for a role that the format doesn't know."""
    for n, message in enumerate(messages):
      if message.role not in self.roles:
        raise InputError(
          f'messages[{n}].role = {message.role!r}: the chat format {self.name}'
          f' knows {", ".join(self.roles)}'
        )

  def _check(
    self, tools: Sequence[Any], effort: Any, answer: Any, required: bool
  ) -> None:
    """Raises InputError for an option that the format has no words for."""
    for name, given, known in (
      ('tools', tools, self.tools),
      ('effort', effort, self.efforts),
      ('response_format', answer, self.answers),
      ('tool_choice', required, self.markup.opens and self.tools),
    ):
      if given and not known:
        raise InputError(
          f'{name}: the chat format {self.name} has no words for it; leave it'
          ' out, or say it in a system message'
        )

  def turns(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool | None = None,
    **options: Any,
  ) -> list[Turn]:
    """Returns each assistant's turn in the form in which it was generated.

    A later prompt may show a turn otherwise, such as without its reasoning:
    each turn is an example of its own.

    Args:
      messages: a whole conversation.
      thinking: None: a turn thinks if it has reasoning.
      **options: of `read`.

    Returns:
      (prompt, answer) of each turn; the answer ends with the mark that ends a
      turn, but for the last if it has prefix=True.
    """
    talk = self.read(messages, thinking=thinking, **options)
    out = []
    for n, message in enumerate(talk.messages):
      if message.role != 'assistant':
        continue
      thinks = self._reasoning(message) != '' if thinking is None else thinking
      before = talk._replace(
        messages=talk.messages[:n], thinking=thinks, required=False
      )
      prompt = self._render(before, True)
      answer = self._answer(message, thinks, prompt)
      out.append((joined(prompt), joined(answer)))
    return out

  def thought(self, messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Returns whether each assistant's turn of a conversation has reasoning."""
    return [
      self._reasoning(message) != ''
      for message in self.read(messages).messages
      if message.role == 'assistant'
    ]

  def rewrites_history(
    self, messages: Sequence[Mapping[str, Any]], **options: Any
  ) -> bool:
    """Returns whether a turn reads otherwise later than when it was generated.

    If so, a cache of its tokens is of no use to the next turn, and the whole
    conversation is no training example of its turns.

    Args:
      messages: a whole conversation.
      **options: of `read`.
    """
    whole = text_of(self.render(messages, generation=False, **options))
    talk = self.read(messages, **options)
    turns = self.turns(messages, **options | {'thinking': talk.thinking})
    return not all(
      whole.startswith(text_of(prompt) + text_of(answer))
      for prompt, answer in turns
    )

  def parser(
    self,
    tokenizer: Tokenizer | ByteTokenizer,
    prompt: Sequence[int] = (),
    *,
    tools: bool = True,
    stop: Sequence[str] = (),
    ends: Sequence[int] = (),
    spell: bool = False,
  ) -> parse.Parser:
    """Returns a parser of the tokens that follow a prompt.

    Args:
      tokenizer: of the model.
      prompt: token ids; its end decides whether the answer begins in reasoning.
      tools: whether to read tool calls; else their markup is content.
      stop: texts that end the content.
      ends: tokens that end a turn besides the format's own.
      spell: read marks that the tokenizer lacks from the text, as `encode`
        writes them.
    """
    return parse.Parser(
      tokenizer,
      self.marks,
      self.markup if tools else None,
      prompt=prompt,
      stop=stop,
      ends=ends,
      spell=spell,
    )

  def _reasoning(self, message: Message) -> str:
    """Returns what an assistant thought."""
    return message.reasoning

  def _render(self, talk: Talk, generation: bool) -> list[Piece]:
    """Returns the pieces of a conversation."""
    raise NotImplementedError

  def _answer(
    self, message: Message, thinking: bool, prompt: list[Piece]
  ) -> list[Piece]:
    """Returns what a model generates for a turn, behind its prompt."""
    raise NotImplementedError
