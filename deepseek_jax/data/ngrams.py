"""Computes which rows of Engram's tables an n-gram reads.

Engram: arXiv:2601.07372, section 2.

Tokens whose text differs in case, accents or spacing alone share a class. The
classes of the last n tokens are multiplied by odd 64-bit numbers, mixed by
exclusive or, and taken modulo a prime per table. Nothing here runs on a
device: products need 63 bits, which int64 of NumPy holds and JAX's default
int32 would silently cut.
Legend: B batch, T tokens, L layers with tables, N longest n-gram, O = N - 1
orders (2 to N), H tables of an order, K = O H tables of a layer.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError

PAD = 0  # the class of padding and of what is before a document's start
_WITNESSES = (2, 3, 5, 7)  # decide every number below 3,215,031,751


class Hash(NamedTuple):
  """Holds all that decides rows, apart from the classes of tokens."""

  multipliers: np.ndarray  # [L N] int64, odd
  primes: np.ndarray  # [L O H] int64, rows of each table


def is_prime(n: int) -> bool:
  """Returns whether n is prime, by Miller and Rabin; exact below 3.2e9."""
  if n < 2 or any(n % p == 0 for p in _WITNESSES):
    return n in _WITNESSES
  odd, twos = n - 1, 0
  while odd % 2 == 0:
    odd, twos = odd // 2, twos + 1
  for witness in _WITNESSES:
    powers = [pow(witness, odd << i, n) for i in range(twos)]
    if powers[0] != 1 and n - 1 not in powers:
      return False
  return True


def primes(base: int, layers: int, orders: int, heads: int) -> np.ndarray:
  """Returns table sizes [L O H]: orders start at base, no prime twice."""
  used: set[int] = set()
  for _ in range(layers * orders):
    free = (p for p in itertools.count(base) if p not in used and is_prime(p))
    used.update(list(itertools.islice(free, heads)))
  # An order takes the next unused ones, so sorted order is order of making.
  return np.array(sorted(used), np.int64).reshape(layers, orders, heads)


def multipliers(
  layers: tuple[int, ...], longest: int, classes: int, seed: int
) -> np.ndarray:
  """Returns [L N] odd int64, by the numbers of the layers in the model.

  So small that no product with a class reaches 2^63.
  """
  bound = max(1, ((2**63 - 1) // classes) // 2)
  draw = lambda layer: np.random.default_rng(seed + 10007 * layer).integers(
    0, bound, longest, np.int64
  )
  return np.stack([2 * draw(layer) + 1 for layer in layers])


def offsets(sizes: np.ndarray) -> np.ndarray:
  """Returns the first row of each table in its layer's one table, [L O H]."""
  flat = sizes.reshape(len(sizes), -1)
  return (np.cumsum(flat, axis=1) - flat).reshape(sizes.shape)


def look_back(
  classes: np.ndarray, positions: np.ndarray, segments: np.ndarray, longest: int
) -> np.ndarray:
  """Returns the classes of the last tokens, [B T] -> [B T N] int64.

  Entry k is that of the token k places before; PAD where that token is of
  another document or before the window.
  """
  T = classes.shape[1]
  out = np.full((*classes.shape, longest), PAD, np.int64)
  for k in range(min(longest, T)):
    now, before = slice(k, T), slice(0, T - k)
    same = segments[:, now] == segments[:, before]
    same = same & (positions[:, now] >= k)
    out[:, now, k] = np.where(same, classes[:, before], PAD)
  return out


def rows(window: np.ndarray, how: Hash) -> np.ndarray:
  """Returns the rows of the layers' tables [B T L K] for classes [B T N].

  Args:
    window: [B T N] int64 classes of the last tokens, see `look_back`.
    how: multipliers and primes.
  """
  out = []
  layers = zip(how.multipliers, how.primes, offsets(how.primes))
  for factors, sizes, first in layers:
    mixed, parts = window[..., 0] * factors[0], []
    for k in range(1, len(factors)):
      # The (k + 1)-gram's mix extends that of the k-gram by one token.
      mixed = mixed ^ (window[..., k] * factors[k])
      parts.append(mixed[..., None] % sizes[k - 1] + first[k - 1])
    out.append(np.concatenate(parts, axis=-1))
  return np.stack(out, axis=-2)


class NGrams(NamedTuple):
  """Adds the rows of n-grams to the batches of the data pipeline."""

  classes: np.ndarray  # [V] class of each token
  how: Hash

  def __call__(
    self, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray
  ) -> np.ndarray:
    """Returns rows [B T L K] int32.

    Args:
      tokens, segments, positions: int32 [B T] each.

    Raises:
      InputError: a token is outside the vocabulary; padding may be.
    """
    # Padding may hold any id: it is read as token 0, which no token looks at.
    inside = (tokens >= 0) & (tokens < len(self.classes))
    wrong = tokens[~inside & (segments > 0)]
    if wrong.size:
      raise InputError(
        f'tokens: {wrong[0]} is outside the vocabulary of {len(self.classes)}'
      )
    classes = self.classes[np.where(inside, tokens, 0)].astype(np.int64)
    longest = self.how.multipliers.shape[1]
    window = look_back(classes, positions, segments, longest)
    return rows(window, self.how).astype(np.int32)


@functools.cache
def _normalizers() -> tuple[Any, Any]:
  """Returns the published normalizers of classes, strip apart."""
  from tokenizers import Regex, normalizers

  steps = (
    normalizers.NFKC(),
    normalizers.NFD(),
    normalizers.StripAccents(),  # all marks, not just those without a width
    normalizers.Lowercase(),
    normalizers.Replace(Regex(r'[ \t\r\n]+'), ' '),
  )
  return normalizers.Sequence(list(steps)), normalizers.Strip()


def normalized(text: str) -> str:
  """Returns what tokens of one class have in common; a lone space stays one.

  Text of which nothing is left, such as an accent alone, stays as it is.
  """
  plain, strip = _normalizers()
  short = plain.normalize_str(text)
  return short if short == ' ' else strip.normalize_str(short) or text


def token_classes(
  tokenizer: Tokenizer | ByteTokenizer, vocab_size: int
) -> np.ndarray:
  """Returns the class of each token, [vocab_size] int32; padding's is 0.

  Tokens that are no whole text (bytes of a character) have classes of their
  own. Ids that the tokenizer lacks are like padding.
  """
  out = np.full(vocab_size, PAD, np.int32)
  seen: dict = {tokenizer.pad_id: PAD}
  for i in range(min(tokenizer.vocab_size, vocab_size)):
    if i == tokenizer.pad_id:
      continue
    text = tokenizer.decode([i])
    key = i if '\ufffd' in text or not text else normalized(text)
    out[i] = seen.setdefault(key, len(seen))
  return out
