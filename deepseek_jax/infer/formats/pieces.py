"""Holds a rendered conversation as pieces: text, and marks of the format.

A mark is a special token by name. Text never becomes one, whatever it spells,
as only marks are turned into special ids.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError

BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'
SYSTEM, USER, ASSISTANT = '<｜System｜>', '<｜User｜>', '<｜Assistant｜>'
REMINDER = '<｜latest_reminder｜>'
THINK, END_THINK = '<think>', '</think>'
DSML = '｜DSML｜'


class Piece(NamedTuple):
  """Holds a text, or the name of a special token."""

  text: str
  special: bool = False


def mark(name: str) -> Piece:
  """Returns the piece that is a special token."""
  return Piece(name, True)


def spelled(text: str, *names: str) -> list[Piece]:
  """Returns a text of the format itself, `names` in it as marks."""
  parts = re.split(f'({"|".join(map(re.escape, names))})', text)
  pieces = [Piece(part, n % 2 == 1) for n, part in enumerate(parts)]
  return [piece for piece in pieces if piece.text]


def joined(pieces: Iterable[Piece]) -> list[Piece]:
  """Returns pieces without empty ones, neighbouring texts as one.

  Tokens may reach over the border of two texts, never over a mark.
  """
  out: list[Piece] = []
  for piece in pieces:
    if out and not piece.special and not out[-1].special:
      out[-1] = Piece(out[-1].text + piece.text)
    elif piece.text:
      out.append(Piece(*piece))
  return out


def text_of(pieces: Iterable[Piece]) -> str:
  """Returns pieces as one text, marks by name."""
  return ''.join(piece.text for piece in pieces)


def ids_of_marks(
  tokenizer: Tokenizer | ByteTokenizer, names: Iterable[str]
) -> dict[str, int]:
  """Returns the ids of those marks that a tokenizer has as special tokens."""
  out = {}
  for name in names:
    ids = tokenizer.encode(name, special=True)
    # Text that is one token by itself is no mark: users may write it.
    if len(ids) == 1 and tokenizer.encode(name) != ids:
      out[name] = ids[0]
  return _own_ends(tokenizer, names) | out


def _own_ends(
  tokenizer: Tokenizer | ByteTokenizer, names: Iterable[str]
) -> dict[str, int]:
  """Returns the tokenizer's own ends under the names that formats use."""
  own = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
  return {n: own[n] for n in names if own.get(n) is not None}


def encode(
  tokenizer: Tokenizer | ByteTokenizer,
  pieces: Sequence[Piece],
  *,
  spell: bool = False,
) -> list[int]:
  """Returns the token ids of pieces: marks by id, text as text.

  The beginning and end of a text are the tokenizer's own, if it names them
  otherwise than the format does.

  Args:
    tokenizer: of the model.
    pieces: as a format renders them.
    spell: write marks that the tokenizer lacks as text. Users can write that
      text, too: only for models whose prompts need no such protection.

  Raises:
    InputError: the tokenizer lacks marks.
  """
  ids = ids_of_marks(tokenizer, {p.text for p in pieces if p.special})
  missing = {p.text: None for p in pieces if p.special and p.text not in ids}
  if spell:
    pieces = [Piece(p.text, p.special and p.text in ids) for p in pieces]
  elif missing:
    raise InputError(
      f'tokenizer: lacks {", ".join(missing)} of the chat format: use the'
      ' format that the model was trained on, add them as special tokens, or'
      ' pass spell=True'
    )
  out: list[int] = []
  for piece in joined(pieces):
    new = [ids[piece.text]] if piece.special else tokenizer.encode(piece.text)
    out += new
  return out
