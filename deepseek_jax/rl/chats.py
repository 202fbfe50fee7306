"""Turns conversations into token ids: what a model reads, what it must produce.

A chat is anything with `turns`, `prompt` and `ends`. Templates rewrite history,
DeepSeek's all do: so each assistant's turn is an example of its own, in the
form in which it was generated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from deepseek_jax.config import at_least, check_choices
from deepseek_jax.data import boundaries
from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer import chat, formats
from deepseek_jax.infer.formats.message import REASONING

# arXiv:2501.12948, table 1, without the sentence that opens it.
_R1_ZERO = (
  'A conversation between User and Assistant. The User asks a question, and the'
  ' Assistant solves it. The Assistant first thinks about the reasoning process'
  ' in the mind and then provides the User with the answer. The reasoning'
  ' process and answer are enclosed within <think>...</think> and'
  ' <answer>...</answer> tags, respectively. User: {}. Assistant:'
)


class Turn(NamedTuple):
  """Holds token ids of one assistant's turn."""

  prompt: list[int]  # all that the model reads before it answers
  answer: list[int]  # what it must produce, the end of the turn included


class ChatWriter(Protocol):
  """Describes how conversations are written.

  Attributes:
    ends: token ids that end a turn.
  """

  ends: tuple[int, ...]

  def turns(
    self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()
  ) -> list[Turn]:
    """Returns every assistant's turn of a conversation."""

  def prompt(self, text: str) -> list[int]:
    """Returns what the model reads when a user has asked `text`."""

  def message(self, prompt: Sequence[int], answer: Sequence[int]) -> dict:
    """Returns the assistant's message that tokens behind a prompt spell."""


def check(turn: Turn, ends: Sequence[int]) -> None:
  """Raises InputError for a turn that would teach nothing, or never to stop."""
  if not turn.answer:
    raise InputError(
      'an answer has no token: there is nothing to learn from it'
    )
  if turn.answer[-1] not in ends:
    known = ', '.join(map(str, ends)) or 'there are none'
    raise InputError(
      f'an answer ends with token {turn.answer[-1]}, none of those that end a'
      f' turn ({known}): the model would never learn to stop; use a chat format'
      ' that ends turns'
    )


def spoken(
  chat: ChatWriter,
  tokenizer: Tokenizer | ByteTokenizer,
  text: str,
  answer: Sequence[int],
) -> list[dict] | None:
  """Returns the conversation of a question and a sampled answer.

  None where it would be learnt otherwise than it was sampled, spaces aside: the
  answer is of no form that the chat writes, has no end, or its question is
  written otherwise once it is answered.

  Args:
    chat: how it was asked.
    tokenizer: of the chat.
    text: the question.
    answer: sampled tokens, the end of the turn with them.
  """
  prompt = chat.prompt(text)
  messages = [
    {'role': 'user', 'content': text},
    chat.message(prompt, answer),
  ]
  try:
    turns = chat.turns(messages)
    for turn in turns:
      check(turn, chat.ends)
  except InputError:
    return None
  # Tokens may be others of the same text: an encoder has one way to write it.
  text_of = tokenizer.decode
  if len(turns) != 1 or text_of(turns[0].prompt) != text_of(prompt):
    return None
  # A form has spaces of its own, around </think> or at the ends.
  written, said = (text_of(ids).split() for ids in (turns[0].answer, answer))
  return messages if ''.join(written) == ''.join(said) else None


def _plain_message(
  tokenizer: Tokenizer | ByteTokenizer,
  answer: Sequence[int],
  ends: Sequence[int],
) -> dict:
  """Returns a message of the text of an answer, its end left out."""
  said = tokenizer.decode([token for token in answer if token not in ends])
  return {'role': 'assistant', 'content': said}


@dataclasses.dataclass(frozen=True)
class PlainChat:
  """Writes a prompt and its completion one after the other, then the end.

  Attributes:
    tokenizer: whose end-of-text token ends a turn.
    form: holds '{}' for the prompt.
  """

  tokenizer: Tokenizer | ByteTokenizer
  form: str = '{}'

  @property
  def ends(self) -> tuple[int, ...]:
    """Returns the end-of-text token."""
    return (self.tokenizer.eos_id,)

  def turns(
    self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()
  ) -> list[Turn]:
    """Returns the one turn; InputError unless a user asks and is answered."""
    roles = [m['role'] for m in messages]
    if roles != ['user', 'assistant'] or tools:
      also = ' and tools' if tools else ''
      raise InputError(
        f'a conversation of {", ".join(roles)}{also}: this format holds one'
        ' prompt and its completion; choose a chat format of a model'
      )
    if messages[1]['content'] is None:
      raise InputError(
        'the answer calls tools and says nothing: this format holds text alone;'
        ' choose a chat format of a model'
      )
    for name in (*REASONING, 'tool_calls'):
      if messages[1].get(name):
        raise InputError(
          f'the answer has {name}, which this format does not write; choose a'
          ' chat format of a model, or put it into the content'
        )
    answer = self.tokenizer.encode(messages[1]['content'])
    return [Turn(self.prompt(messages[0]['content']), [*answer, *self.ends])]

  def prompt(self, text: str) -> list[int]:
    """Returns the tokens of a prompt."""
    return self.tokenizer.encode(self.form.replace('{}', text))

  def message(self, prompt: Sequence[int], answer: Sequence[int]) -> dict:
    """Returns the answer's text as a message."""
    del prompt
    return _plain_message(self.tokenizer, answer, self.ends)


def r1_zero(tokenizer: Tokenizer | ByteTokenizer) -> PlainChat:
  """Returns the template of R1-Zero, which is plain text."""
  return PlainChat(tokenizer, _R1_ZERO)


class TemplateChat:
  """Writes conversations by the chat template of a published folder."""

  def __init__(
    self,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | ByteTokenizer,
    ends: Sequence[int] = (),
    **variables: Any,
  ):
    """Takes what `chat.template_config` returns.

    Args:
      config: with the template.
      tokenizer: of the folder.
      ends: tokens that end a turn, beside the end-of-text token.
      **variables: more that the template knows.
    """
    self._config, self._tokenizer = config, tokenizer
    self._variables = variables
    self.ends = tuple(dict.fromkeys((*ends, tokenizer.eos_id)))

  def turns(
    self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()
  ) -> list[Turn]:
    """Returns every assistant's turn: what the template adds for it.

    Raises:
      InputError: the template writes a prompt otherwise once it is answered,
        or leaves out what was said.
    """
    out = []
    for n, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      before = self._render(messages[:n], tools, add_generation_prompt=True)
      whole = self._render(
        messages[: n + 1], tools, add_generation_prompt=False
      )
      if not whole.startswith(before):
        raise InputError(
          f'message {n + 1}: the template writes the prompt otherwise once it'
          ' is answered, so the answer can not be told from it; use a chat'
          ' format of this library'
        )
      answer = whole[len(before) :]
      self._check_said(message, answer, n)
      encode = lambda text: self._tokenizer.encode(text, special=True)
      out.append(Turn(encode(before), self._ended(encode(answer))))
    return out

  def _ended(self, answer: list[int]) -> list[int]:
    """Returns an answer without what the template writes behind its end."""
    ends = [n for n, token in enumerate(answer, start=1) if token in self.ends]
    return answer[: ends[-1]] if ends else answer

  def prompt(self, text: str) -> list[int]:
    """Returns the tokens of a user's question, opened for an answer."""
    said = self._render(
      [{'role': 'user', 'content': text}], (), add_generation_prompt=True
    )
    return self._tokenizer.encode(said, special=True)

  def message(self, prompt: Sequence[int], answer: Sequence[int]) -> dict:
    """Returns the answer's text as a message; a template tells no parts."""
    del prompt
    return _plain_message(self._tokenizer, answer, self.ends)

  def _render(
    self, messages: Sequence[Mapping], tools: Sequence[Mapping], **flags: bool
  ) -> str:
    """Returns the text of messages."""
    return chat.render(
      self._config,
      messages,
      tools=list(tools) or None,
      **flags,
      **self._variables,
    )

  def _check_said(self, message: Mapping, answer: str, n: int) -> None:
    """Raises InputError where the answer's text is not what was said."""
    for name in (*REASONING, 'content'):
      said = message.get(name)
      spelled = self._tokenizer.encode(said or '', special=True)
      if set(spelled) & set(self.ends):
        raise InputError(
          f'message {n + 1}: its {name} spells a token that ends a turn; take'
          ' it out, or use a chat format of this library'
        )
      if said and said.strip() not in answer:
        raise InputError(
          f'message {n + 1}: the template leaves out its {name} or changes it,'
          ' so the model would not learn it; use a chat format of this library'
        )
    for call in message.get('tool_calls') or ():
      called = call.get('function') if isinstance(call, Mapping) else None
      name = called.get('name') if isinstance(called, Mapping) else None
      if not isinstance(name, str) or name not in answer:
        raise InputError(
          f'message {n + 1}: the template leaves out its call of {name!r}, so'
          ' the model would not learn it; use a chat format of this library'
        )


class FormatChat:
  """Writes conversations in one of DeepSeek's formats, see `infer.formats`."""

  def __init__(
    self,
    form: formats.Format,
    tokenizer: Tokenizer | ByteTokenizer,
    thinking: bool | None = None,
  ):
    """Takes a format, and whether turns think; None: those with reasoning."""
    self._form, self._tokenizer, self._thinking = form, tokenizer, thinking
    end = formats.pieces.ids_of_marks(tokenizer, [formats.pieces.EOS])
    self.ends = tuple(dict.fromkeys((*end.values(), tokenizer.eos_id)))

  def turns(
    self, messages: Sequence[Mapping], tools: Sequence[Mapping] = ()
  ) -> list[Turn]:
    """Returns every assistant's turn, with the reasoning that it had."""
    encode = lambda pieces: formats.encode(self._tokenizer, pieces)
    found = self._form.turns(
      messages, thinking=self._thinking, tools=list(tools) or None
    )
    return [Turn(encode(prompt), encode(answer)) for prompt, answer in found]

  def prompt(self, text: str) -> list[int]:
    """Returns the tokens of a user's question, opened for an answer."""
    pieces = self._form.render(
      [{'role': 'user', 'content': text}], thinking=self._thinking
    )
    return formats.encode(self._tokenizer, pieces)

  def asks_otherwise(self, messages: Sequence[Mapping]) -> bool:
    """Returns whether `prompt` opens no answer as these turns are opened."""
    if self._thinking is not None:
      return False
    return self._form.thinks not in self._form.thought(messages)

  def message(self, prompt: Sequence[int], answer: Sequence[int]) -> dict:
    """Returns the message that an answer spells, its reasoning by itself."""
    parser = self._form.parser(self._tokenizer, prompt, ends=self.ends)
    return parser.parse(answer).message()


@dataclasses.dataclass(frozen=True)
class ChatConfig:
  """Describes how the conversations of a run are written.

  Attributes:
    format: 'plain' (a prompt, its completion, the end of text), 'r1_zero' (the
      template of R1-Zero), 'template' (that of `folder`), or a format of
      DeepSeek's.
    folder: of Hugging Face, with the template.
    thinking: whether turns think, where a format tells; None: those with
      reasoning do.
    shown: examples whose mask is drawn before the run.
  """

  format: Literal[
    'plain', 'r1_zero', 'template', 'v3', 'r1', 'v32', 'v4', 'v41'
  ] = 'plain'
  folder: str = ''
  thinking: bool | None = None
  shown: int = 3

  def __post_init__(self) -> None:
    """Raises InputError for fields that do not fit."""
    check_choices(self)
    at_least(self, 'chat.', shown=0)
    if (self.format == 'template') != bool(self.folder):
      raise InputError(
        f'chat.folder = {self.folder!r}: chat.format = {self.format!r};'
        " 'template' needs the folder that holds it, and others none"
      )

  def build(self, tokenizer: Tokenizer | ByteTokenizer) -> ChatWriter:
    """Returns the chat; InputError if the tokenizer lacks its marks."""
    if self.format == 'plain':
      return PlainChat(tokenizer)
    if self.format == 'r1_zero':
      return r1_zero(tokenizer)
    if self.format == 'template':
      config = chat.template_config(self.folder)
      ends = boundaries.boundaries(self.folder, tokenizer).ends
      return TemplateChat(config, tokenizer, ends)
    return FormatChat(formats.get(self.format), tokenizer, self.thinking)
