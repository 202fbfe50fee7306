"""Describes the data of a run: a corpus, a tokenizer and how both are cut."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from deepseek_jax.errors import InputError

MARK = '::'  # between a source and a document's name


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Describes text -> tokens -> windows; every field changes what is read.

  path: 'stdlib' (the source of the running interpreter's standard library), a
    file or a directory of .txt, .py, .md, .jsonl, .json, .parquet and .arrow
    files, all but the last two also as .gz and .zst. Of a Hugging Face dataset
    the training split is read; what else is left out is reported.
  sources: path -> weight, in place of `path`: each window is of one source, as
    often as its weight says, in an order that `seed` decides; a source begins
    anew when it is read through, whatever the others do. The tokenizer is
    learnt from all, and of each the same share of documents is held out.
  tokenizer: 'bpe' (byte-level BPE trained on the training documents), 'bytes',
    or the path of a Hugging Face tokenizer.json.
  vocab_size: 'bpe' trains exactly so many tokens; otherwise it is the model's
    vocabulary, which has to hold the tokenizer's.
  seq_len: T, the tokens that the model reads at once; windows hold T + 1.
  fim_rate: share of the training documents in fill-in-the-middle form; 0.1 in
    DeepSeek-V3 (arXiv:2412.19437, section 4.1).
  heldout_fraction: share of the documents, chosen by a hash of their text,
    that is never trained on.
  cross_document: whether a token may attend to an earlier document of its
    window; True in DeepSeek-V3's pre-training. Without it no token of a
    training document follows another document, so a first token is never
    learnt; validation, which begins each document with EOS, charges it.
  seed: decides the order of the windows and the fill-in-the-middle splits.
  cache_dir: where token windows are kept; None is ~/.cache/deepseek_jax.
  """

  path: str = 'stdlib'
  sources: dict[str, float] | None = None
  tokenizer: str = 'bpe'
  vocab_size: int = 4096
  seq_len: int = 256
  fim_rate: float = 0.1
  heldout_fraction: float = 0.03
  cross_document: bool = True
  seed: int = 0
  cache_dir: str | None = None

  def __post_init__(self) -> None:
    """Raises InputError for a value of the wrong type or out of range."""
    text, number = "'stdlib', a file or a directory", 'a whole number >= 1'
    model = "'bpe', 'bytes' or the path of a tokenizer.json"
    seed = 'a whole number from 0 to 2**32 - 1'
    self._expect('path', _is_name(self.path), text)
    self._check_sources()
    self._expect('tokenizer', _is_name(self.tokenizer), model)
    number += ' that int32 holds'
    for size in ('vocab_size', 'seq_len'):
      fits = _is_int(getattr(self, size), 1) and getattr(self, size) < 2**31
      self._expect(size, fits, number)
    cache = self.cache_dir or None
    self._expect('cache_dir', cache is None or _is_name(cache), 'a directory')
    self._expect('fim_rate', _is_share(self.fim_rate), 'a share from 0 to 1')
    held = _is_share(self.heldout_fraction) and self.heldout_fraction < 1
    self._expect('heldout_fraction', held, 'a share from 0 to below 1')
    self._expect('seed', _is_int(self.seed, 0), seed)

  def _check_sources(self) -> None:
    """Raises InputError for sources that are no paths with weights."""
    if self.sources is None:
      return
    what = (
      "a dict of paths and weights above 0, as {'code/': 0.7, 'text/': 0.3}"
    )
    sources = self.sources
    if not isinstance(sources, Mapping):
      self._expect('sources', False, what)
    whole = lambda w: isinstance(w, int | float) and not isinstance(w, bool)
    good = [
      _is_name(path) and MARK not in path and whole(w) and 0 < w < math.inf
      for path, w in sources.items()
    ]
    self._expect('sources', bool(good) and all(good), what)
    if self.path != 'stdlib':
      raise InputError(
        f'data.path={self.path!r}: data.sources names what is read; put it'
        ' there, with a weight, or leave one of both out'
      )

  @property
  def paths(self) -> tuple[str, ...]:
    """Returns what is read: `path`, or the paths of `sources`."""
    return tuple(self.sources) if self.sources else (self.path,)

  @property
  def shares(self) -> tuple[float, ...]:
    """Returns which share of the windows each of `paths` has."""
    weights = tuple(self.sources.values()) if self.sources else (1.0,)
    return tuple(weight / sum(weights) for weight in weights)

  def _expect(self, field: str, holds: bool, what: str) -> None:
    """Raises InputError unless `holds`; `what` is to be set in its place."""
    if not holds:
      value = getattr(self, field)
      raise InputError(f'data.{field}={value!r}: set it to {what}')

  def cache(self) -> str:
    """Returns the directory of the cache, `~` expanded."""
    if self.cache_dir:
      return os.path.expanduser(self.cache_dir)
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(home, 'deepseek_jax')


def _is_name(value: Any) -> bool:
  """Returns whether a value may be a path or a name."""
  return isinstance(value, str) and value != '' and '\0' not in value


def _is_int(value: Any, least: int) -> bool:
  """Returns whether a value is an int, no bool, from `least` below 2^32."""
  number = isinstance(value, int) and not isinstance(value, bool)
  return number and least <= value < 2**32


def _is_share(value: Any) -> bool:
  """Returns whether a value is a number, no bool, from 0 to 1."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and 0 <= value <= 1
