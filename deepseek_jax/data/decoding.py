"""Decodes a stream of tokens: the text, as soon as it is certain.

What a decoder has given never changes, so it waits where a later token could
still decide: in the middle of a character's bytes, or of a run of byte tokens.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence


class ByteDecoder:
  """Decodes tokens that are bytes of UTF-8.

  Attributes:
    bytes_of: (id -> bytes) of the tokenizer.
  """

  def __init__(self, token_bytes: Callable[[int], bytes]):
    """Takes the function (id -> bytes) of the tokenizer."""
    self.bytes_of = token_bytes
    self._utf8 = codecs.getincrementaldecoder('utf-8')('replace')

  def feed(self, token: int) -> str:
    """Returns the text that is certain with this token; may be empty."""
    return self._utf8.decode(self.bytes_of(token))

  def finish(self) -> str:
    """Returns what is left when no token follows."""
    return self._utf8.decode(b'', final=True)

  @property
  def pending(self) -> bool:
    """Returns whether the tokens so far end inside a character."""
    return bool(self._utf8.getstate()[0])


class TokenDecoder:
  """Decodes tokens whose text depends on their neighbours.

  A run of byte tokens such as <0xE2> is text only if all of it is UTF-8, so it
  waits for its end. A tokenizer may drop a blank at the start of a text:
  tokens are decoded behind those whose text came last.
  """

  def __init__(
    self,
    decode: Callable[[Sequence[int]], str],
    is_open: Callable[[int], bool],
    after: Sequence[int] = (),
    *,
    waits: bool = False,
  ):
    """Starts behind the tokens of `after`.

    Args:
      decode: ids -> text.
      is_open: whether a token is one of a run of bytes, so that what follows
        decides its text.
      after: ids before the stream.
      waits: give all text at the end, as any later token may change it.
    """
    self._decode, self._is_open, self._waits = decode, is_open, waits
    self._behind, self._new = list(after), []

  def feed(self, token: int) -> str:
    """Returns the text that is certain with this token; may be empty."""
    self._new.append(token)
    return '' if self._waits or self._is_open(token) else self.finish()

  def finish(self) -> str:
    """Returns what is left when no token follows."""
    whole = self._decode(self._behind + self._new)
    text = whole[len(self._decode(self._behind)) :]
    if text:
      self._behind, self._new = self._new, []
    return text

  @property
  def pending(self) -> bool:
    """Returns whether text of the tokens so far waits for a later one."""
    return bool(self._new)


def byte_level_alphabet() -> dict[str, int]:
  """Returns the byte that each character of a byte-level vocabulary stands for.

  Printable Latin-1 stands for itself; the other bytes, in order, for the
  characters from U+0100 on (GPT-2's alphabet).
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  out = {chr(byte): byte for byte in printable}
  rest = [byte for byte in range(256) if chr(byte) not in out]
  return out | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


def is_byte_level(decoder: Mapping | None) -> bool:
  """Returns whether a decoder joins all tokens' bytes, and does no more.

  Args:
    decoder: that of a tokenizer.json.
  """
  return [part.get('type') for part in _parts(decoder)] == ['ByteLevel']


def is_incremental(decoder: Mapping | None) -> bool:
  """Returns whether text depends on no later token, byte runs excepted.

  Args:
    decoder: that of a tokenizer.json.
  """
  for part in _parts(decoder):
    kind = part.get('type')
    if kind == 'Replace':  # one that is longer may reach over tokens
      pattern = part.get('pattern', {}).get('String', '')
      fine = len(pattern) == 1
    elif kind == 'Strip':
      fine = part.get('stop', 0) == 0
    else:
      fine = kind in ('ByteFallback', 'Fuse', 'Metaspace')
    if not fine:
      return False
  return True


def _parts(decoder: Mapping | None) -> list[Mapping]:
  """Returns the steps of a decoder, in order."""
  if decoder is None:
    return []
  if decoder.get('type') == 'Sequence':
    return decoder.get('decoders', [])
  return [decoder]
