"""Tokenizes text to token ids and exactly back.

Byte-level BPE (trained here or a Hugging Face tokenizer.json) and plain bytes
share one interface. Text never turns into a special token: a document that
spells `<|eos|>` is read letter by letter, so only the packer ends documents.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from deepseek_jax.data import decoding, special_tokens
from deepseek_jax.errors import InputError, naming

PAD, EOS = '<|pad|>', '<|eos|>'
FIM = ('<|fim_begin|>', '<|fim_hole|>', '<|fim_end|>')
SPECIAL = (PAD, EOS, *FIM)  # ids 0 to 4

# Names that published tokenizers use, in prefix-suffix-middle order.
_EOS_NAMES = (EOS, '<｜end▁of▁sentence｜>', '<|endoftext|>', '<|end_of_text|>')
_FIM_NAMES = (
  FIM,
  ('<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>'),
  ('<|fim_prefix|>', '<|fim_suffix|>', '<|fim_middle|>'),
)

_BYTE = re.compile('<0x[0-9A-Fa-f]{2}>')

_PROBE = "class F(X):\n    return  x + 1234567\t# 'naïve' … 東京 🎉\r\n\n"


class FimIds(NamedTuple):
  """Holds the ids of the fill-in-the-middle marks."""

  begin: int
  hole: int
  end: int


class ByteTokenizer:
  """Makes a byte a token, after the five special ones; needs no file."""

  kind = 'bytes'
  pad_id, eos_id, bos_id = 0, 1, None
  fim = FimIds(2, 3, 4)
  around = ((), ())
  vocab_size = len(SPECIAL) + 256

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Returns the token ids of a text.

    Args:
      text: any text.
      special: read names of special tokens in the text as those tokens.
    """
    if special:
      names = '|'.join(map(re.escape, SPECIAL))
      parts = re.split(f'({names})', text)  # names at the odd places
      ids = [self.encode(part) for part in parts]
      ids[1::2] = [[SPECIAL.index(name)] for name in parts[1::2]]
      return [i for part in ids for i in part]
    return [byte + len(SPECIAL) for byte in text.encode()]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text: special tokens by name, bytes not UTF-8 as U+FFFD.

    Leaves out ids past the vocabulary: a model's may be larger.
    """
    return b''.join(map(self._bytes, ids)).decode('utf-8', 'replace')

  def decoder(self, after: Sequence[int] = ()) -> decoding.ByteDecoder:
    """Returns a decoder of a stream of tokens behind those of `after`."""
    del after  # text is that of the bytes, wherever they stand
    return decoding.ByteDecoder(self._bytes)

  def _bytes(self, token: int) -> bytes:
    """Returns the bytes of a token; none past the vocabulary."""
    first = len(SPECIAL)
    if token >= self.vocab_size:
      return b''
    return bytes([token - first]) if token >= first else SPECIAL[token].encode()

  @property
  def sha256(self) -> str:
    """Returns a hash of all that decides ids."""
    return hashlib.sha256(self._json().encode()).hexdigest()

  def save(self, directory: str) -> None:
    """Writes a folder that `from_file` loads."""
    _write(directory, 'tokenizer.json', self._json())

  def _json(self) -> str:
    """Returns the contents of its tokenizer.json."""
    return json.dumps({'model': {'type': 'Bytes'}, 'special': SPECIAL})


class Tokenizer:
  """Wraps a `tokenizers` tokenizer; keeps text and special tokens apart.

  Attributes: vocab_size (largest id + 1), eos_id, pad_id (eos_id if it has no
  padding token), bos_id (None if it has none), fim (FimIds, or None if it has
  no such tokens), sha256.
  """

  kind = 'bpe'

  def __init__(
    self,
    text: str,
    *,
    eos: str,
    pad: str | None = None,
    declared: special_tokens.Declared | None = None,
  ):
    """Parses a tokenizer.json.

    Args:
      text: its contents.
      eos, pad: names of two tokens.
      declared: from the files beside it; their tokens are read, too, where
        text is encoded with special=True.
    """
    import tokenizers

    spec = json.loads(text)
    self._post_processor = spec.get('post_processor')
    # A published file may carry a length limit, which would cut documents.
    spec |= {'truncation': None, 'padding': None, 'post_processor': None}
    self._spec, self._eos, self._pad = spec, eos, pad
    self._full = tokenizers.Tokenizer.from_str(json.dumps(spec))
    self._plain = tokenizers.Tokenizer.from_str(json.dumps(_all_special(spec)))
    self._plain.encode_special_tokens = True  # as the text that they are
    ids = self._full.get_vocab(with_added_tokens=True)
    self.vocab_size = max(ids.values()) + 1
    self.eos_id = ids[eos]
    self.pad_id = ids.get(pad, self.eos_id)
    names = declared.names if declared else {}
    self.bos_id = ids.get(names.get('bos_token'))
    if declared:
      _add(self._full, declared)
    self._token_bytes = None
    self.fim = next(
      (FimIds(*map(ids.get, n)) for n in _FIM_NAMES if ids.keys() >= set(n)),
      None,
    )

  @functools.cached_property
  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns what the file's post-processor puts before and behind a text."""
    if not self._post_processor:
      return (), ()
    return _around(self._full, self._post_processor)

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Returns the token ids of a text.

    Args:
      text: any text.
      special: read names of special tokens in the text as those tokens.
    """
    model = self._full if special else self._plain
    return model.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes on all cores; the same ids as one by one."""
    out = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in out]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text: special tokens by name, bytes not UTF-8 as U+FFFD.

    Leaves out ids past the vocabulary: a model's may be larger.
    """
    ids = [int(i) for i in ids]
    return self._full.decode(ids, skip_special_tokens=False)

  def decoder(
    self, after: Sequence[int] = ()
  ) -> decoding.ByteDecoder | decoding.TokenDecoder:
    """Returns a decoder of a stream of tokens behind those of `after`."""
    spec = self._spec.get('decoder')
    if decoding.is_byte_level(spec):
      self._token_bytes = self._token_bytes or _token_bytes(self._full)
      return decoding.ByteDecoder(self._token_bytes)
    return decoding.TokenDecoder(
      self.decode,
      self._is_open,
      after,
      waits=not decoding.is_incremental(spec),
    )

  def _is_open(self, token: int) -> bool:
    """Returns whether what follows a token may change its text.

    True for a byte of a run such as <0xE2>.
    """
    # An id past the vocabulary has no text: it ends no run of bytes.
    name = self._full.id_to_token(token)
    return name is None or _BYTE.fullmatch(name) is not None

  @property
  def text_json(self) -> str:
    """Returns a tokenizer.json that reads text as text: all marks special."""
    return self._plain.to_str()

  @property
  def sha256(self) -> str:
    """Returns a hash of all that decides ids: the tokenizer and two names."""
    parts = json.dumps([self._spec, self._eos, self._pad], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()

  def save(self, directory: str) -> None:
    """Writes a folder that `from_file` and transformers both load."""
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      'eos_token': self._eos,
      'pad_token': self._pad,
    }
    _write(directory, 'tokenizer.json', json.dumps(self._spec))
    _write(directory, 'tokenizer_config.json', json.dumps(config))


def _add(model: Any, declared: special_tokens.Declared) -> None:
  """Adds tokens that only the files beside tokenizer.json declare."""
  from tokenizers import AddedToken

  known = {t.content for t in model.get_added_tokens_decoder().values()}
  names = [*declared.names.values(), *declared.more]
  for token in declared.added:
    if token['content'] not in known:
      special = token.get('special') or token['content'] in names
      model.add_tokens([AddedToken(**token | {'special': special})])
  known |= {token['content'] for token in declared.added}
  for name in names:
    if name not in known:
      model.add_special_tokens(
        [AddedToken(name, special=True, normalized=False)]
      )


def _around(
  model: Any, post_processor: dict
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the ids that a post-processor puts before and behind a text."""
  import tokenizers

  # It knows its tokens' ids, so the small model need not know them.
  spec = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
  try:
    wrapper = tokenizers.Tokenizer.from_str(
      json.dumps(spec | {'post_processor': post_processor})
    )
  except Exception as error:  # the parser in Rust raises no narrower class
    raise InputError(f'tokenizer.json: post_processor: {error}') from None
  text = model.encode('a', add_special_tokens=False)
  inner, ids = text.ids, wrapper.post_process(text, None, True).ids
  for at in range(len(ids) - len(inner) + 1):
    if ids[at : at + len(inner)] == inner:
      return tuple(ids[:at]), tuple(ids[at + len(inner) :])
  raise InputError(
    'tokenizer.json: post_processor: changes the tokens of a text'
  )


def _token_bytes(model: Any) -> Callable[[int], bytes]:
  """Returns the function (id -> bytes) of a byte-level tokenizer."""
  alphabet = decoding.byte_level_alphabet()

  @functools.lru_cache(maxsize=1 << 16)
  def token_bytes(token: int) -> bytes:
    name = model.id_to_token(token)
    if name is None:  # a model's vocabulary may be larger
      return b''
    found = [alphabet.get(c) for c in name]
    return name.encode() if None in found else bytes(found)

  return token_bytes


def _all_special(spec: dict) -> dict:
  """Marks every <…> and ｜…｜ token special: some files leave that out.

  Other added tokens, such as runs of spaces, are text and stay in use.
  """
  added = [
    token | {'special': token['special'] or _is_mark(token['content'])}
    for token in spec.get('added_tokens', ())
  ]
  return spec | {'added_tokens': added}


def _is_mark(name: str) -> bool:
  """Returns whether a name is written as <...>, or as DeepSeek's ｜...｜."""
  return len(name) > 2 and name[0] + name[-1] in ('<>', '｜｜')


def from_file(path: str) -> Tokenizer | ByteTokenizer:
  """Loads a tokenizer.json, or the folder that holds one.

  The end-of-text and padding tokens are those of the tokenizer_config.json
  beside it, else the usual names. Raises InputError if the file is missing,
  unreadable, without an end-of-text token, or doesn't give text back exactly.
  """
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    path = os.path.join(path, 'tokenizer.json')
  text = _read(path)
  spec = _parse(text, path)
  if spec.get('model') == {'type': 'Bytes'}:
    return ByteTokenizer()
  declared = special_tokens.declared(os.path.dirname(path))
  try:
    names = {token['content'] for token in spec.get('added_tokens', ())}
    eos = declared.names.get('eos_token') or _first(_EOS_NAMES, names)
    pad = declared.names.get('pad_token') or _first((PAD,), names)
    beside = {token['content'] for token in declared.added}
    known = eos in names | (beside & set(spec['model']['vocab']))
    out = (
      Tokenizer(text, eos=eos, pad=pad, declared=declared) if known else None
    )
  except Exception as error:  # the parser in Rust raises no narrower class
    raise InputError(
      f'data.tokenizer={path!r} is not a tokenizer.json: {error}'
    ) from error
  _check(out, path, eos)
  return out


def _check(tokenizer: Tokenizer | None, path: str, eos: str | None) -> None:
  """Raises InputError without an EOS token, or if text changes on its way."""
  if tokenizer is None:
    raise InputError(
      f'data.tokenizer={path!r} has no end-of-text token {eos or ""}: '
      "name one as 'eos_token' in tokenizer_config.json"
    )
  if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
    raise InputError(
      f'data.tokenizer={path!r} changes text when it decodes: '
      'use a byte-level tokenizer'
    )


def _first(wanted: Sequence[str], names: Container[str]) -> str | None:
  """Returns the first of the wanted names that exists, or None."""
  return next((name for name in wanted if name in names), None)


def _read(path: str) -> str:
  """Returns the text of a file; InputError if it can't be read."""
  try:
    with open(path, encoding='utf-8') as file:
      return file.read()
  except (OSError, ValueError) as error:
    raise InputError(
      f"data.tokenizer: cannot read {path!r}; give 'bpe', 'bytes' or the path "
      'of a tokenizer.json'
    ) from error


def _parse(text: str, path: str) -> dict:
  """Returns the JSON object of a text; InputError if it is none."""
  try:
    spec = json.loads(text)
  except RecursionError:
    raise InputError(
      f'data.tokenizer={path!r} is nested too deeply to be a tokenizer'
    ) from None
  except ValueError as error:
    raise InputError(f'data.tokenizer={path!r} is not JSON: {error}') from error
  if not isinstance(spec, dict):
    raise InputError(f'data.tokenizer={path!r} holds no JSON object')
  return spec


def _write(directory: str, name: str, text: str) -> None:
  """Writes a file; an OSError names it."""
  path = os.path.join(directory, name)
  with naming(path), open(path, 'w', encoding='utf-8') as file:
    file.write(text)
