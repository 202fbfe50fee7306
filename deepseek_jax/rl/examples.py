"""Makes examples of conversations, and shows what is learnt of them."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data.conversations import Conversation
from deepseek_jax.errors import InputError
from deepseek_jax.rl import chats


class Example(NamedTuple):
  """Holds one assistant's turn, with what comes before it."""

  tokens: np.ndarray  # [n] int32
  trained: np.ndarray  # [n] float32, 1 on what the model must produce
  where: str  # file and line of the conversation

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch."""
    return {'tokens': self.tokens, 'trained': self.trained}


@dataclasses.dataclass
class Counts:
  """Counts what became of conversations."""

  conversations: int = 0
  examples: int = 0
  cut: int = 0  # answers that lost their end to the limit
  dropped: int = 0  # examples of which nothing to learn was left

  def line(self) -> str:
    """Returns the counts as a line."""
    return (
      f'{self.conversations} conversations: {self.examples} examples,'
      f' {self.cut} cut at the limit, {self.dropped} dropped since their prompt'
      ' alone reaches it'
    )


def examples(
  conversations: Iterable[Conversation],
  chat: chats.ChatWriter,
  limit: int,
  counts: Counts,
) -> Iterator[Example]:
  """Yields an example of each assistant's turn that is not given.

  Args:
    conversations: what was said.
    chat: how it is written.
    limit: tokens of an example; of a longer one the first stay, and those of
      the answer up to there are learnt.
    counts: adds up what became of them.

  Raises:
    InputError: names the place of a conversation that can't be written.
  """
  for conversation in conversations:
    counts.conversations += 1
    try:
      turns = chat.turns(conversation.messages, conversation.tools)
      turns = turns[conversation.given :]
      for turn in turns:
        chats.check(turn, chat.ends)
    except InputError as error:
      raise InputError(f'{conversation.where}: {error}') from None
    for turn in turns:
      example = _example(turn, limit, conversation.where)
      whole = len(turn.prompt) + len(turn.answer)
      # The first token of a row is predicted from nothing.
      if not example.trained[1:].any():
        counts.dropped += 1
        continue
      counts.cut += whole > limit
      counts.examples += 1
      yield example


def _example(turn: chats.Turn, limit: int, where: str) -> Example:
  """Returns a turn as an example of at most `limit` tokens."""
  tokens = np.array([*turn.prompt, *turn.answer][:limit], np.int32)
  trained = (np.arange(len(tokens)) >= len(turn.prompt)).astype(np.float32)
  return Example(tokens, trained, where)


def shown(
  some: Sequence[Example], tokenizer: Any
) -> list[tuple[str, str, str]]:
  """Returns (place, text, mask) of examples, text by token.

  The mask is as long as the text: '^' below what is learnt, ' ' below the rest.
  Line breaks are shown as the mark ⏎.
  """
  out = []
  for example in some:
    pieces = [
      tokenizer.decode([int(token)]).replace('\n', '⏎')
      for token in example.tokens
    ]
    marks = [' ^'[int(t)] * len(p) for p, t in zip(pieces, example.trained)]
    out.append((example.where, ''.join(pieces), ''.join(marks)))
  return out
