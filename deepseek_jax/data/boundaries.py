"""Finds what begins and ends a text, by the files of a published folder.

The only place that decides it: sampling, chat, streams, conversion and the
certificate ask here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.data import special_tokens
from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError


class Boundaries(NamedTuple):
  """Holds the tokens around a text.

  Attributes:
    begins: stand before the tokens of a prompt.
    closes: stand behind them (few tokenizers have such).
    ends: each of them ends what a model generates; the tokenizer's own first.
    notes: one line for each declaration of the folder that is not followed.
  """

  begins: tuple[int, ...]
  closes: tuple[int, ...]
  ends: tuple[int, ...]
  notes: tuple[str, ...] = ()

  def around(self, ids: Sequence[int]) -> list[int]:
    """Returns a prompt's tokens with what begins and closes a text.

    Equals transformers' ids of the text, but that a prompt which spells the
    beginning itself doesn't get a second one.
    """
    ids = list(ids)
    begun = bool(self.begins) and tuple(ids[: len(self.begins)]) == self.begins
    return [*(() if begun else self.begins), *ids, *self.closes]


def boundaries(
  folder: str,
  tokenizer: Tokenizer | ByteTokenizer,
  config: Mapping[str, Any] | None = None,
) -> Boundaries:
  """Returns what begins and ends a text, by a folder's files.

  What begins a text is what the post-processor of tokenizer.json adds, as in
  transformers 5. What ends it is the union of the tokenizer's eos_token and of
  eos_token_id, a number or a list, in config.json and generation_config.json.

  Args:
    folder: Hugging Face folder, or a converted store.
    tokenizer: its tokenizer.
    config: config.json of the folder, if that is to be found elsewhere.

  Raises:
    InputError: a file is damaged, or eos_token_id is no token.
  """
  if config is None:
    config = special_tokens.read(folder, 'config.json')
  generation = special_tokens.read(folder, 'generation_config.json')
  ends = [
    tokenizer.eos_id,
    *_ends(config, 'config.json'),
    *_ends(generation, 'generation_config.json'),
  ]
  begins, closes = tokenizer.around
  return Boundaries(
    begins,
    closes,
    tuple(dict.fromkeys(ends)),
    _notes(special_tokens.declared(folder), begins, closes),
  )


def of_run(tokenizer: Tokenizer | ByteTokenizer) -> Boundaries:
  """Returns the boundaries of a model trained here: documents only end."""
  return Boundaries((), (), (tokenizer.eos_id,))


def _ends(config: Mapping[str, Any], file: str) -> list[int]:
  """Returns the eos_token_id of a file as a list of ids."""
  found = config.get('eos_token_id')
  if found is None:
    return []
  ids = found if isinstance(found, list) else [found]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise InputError(
      f'{file}: eos_token_id = {found!r}: write a token id or a list of them'
    )
  return ids


def _notes(
  declared: special_tokens.Declared,
  begins: tuple[int, ...],
  closes: tuple[int, ...],
) -> tuple[str, ...]:
  """Returns a line for each declared flag that is not followed."""
  return tuple(
    f'tokenizer_config.json: {flag} = {str(wanted).lower()} is not followed, as'
    ' in transformers 5: the post-processor of tokenizer.json decides, and it'
    f' adds {"a token" if found else "none"}'
    for flag, wanted, found in (
      ('add_bos_token', declared.adds_bos, begins),
      ('add_eos_token', declared.adds_eos, closes),
    )
    if isinstance(wanted, bool) and wanted != bool(found)
  )
