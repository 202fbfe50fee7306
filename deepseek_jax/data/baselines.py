"""Codes held-out text by what a model has to beat: guesses and compressors.

A model reads its training text and a tokenizer that was learnt from it, and is
charged for neither; `xz -9` of a file knows nothing but that file. So beside it
stand codes that know as much: a uniform and a unigram guess over the same
tokens, and compressors that have read the training text. All count the UTF-8
bytes of the same documents.
"""

import concurrent.futures
import contextlib
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from deepseek_jax import files
from deepseek_jax.data.heldout import (
  Heldout,
  uniform_bits_per_byte,
  xz_bits_per_byte,
)
from deepseek_jax.data.token_store import TokenStore

FILE = 'baselines.json'  # beside the tokens
PRIMED = 1 << 24  # bytes of training text that a compressor reads, the last


def unigram_bits_per_byte(heldout: Heldout, vocab_size: int) -> float:
  """Returns the bits per byte of each token's share of the training tokens.

  Every token counts once more than it occurs, so that none is impossible.
  """
  store = heldout.store
  counts = np.ones(vocab_size, np.float64)
  counts += np.bincount(store.train, minlength=vocab_size)
  nats = np.log(counts.sum()) - np.log(counts)
  read = [
    store.heldout[doc.offset : doc.offset + doc.tokens]
    for doc in heldout.documents
  ]
  return heldout.bits_per_byte(math.fsum(nats[ids].sum() for ids in read))


def primed_bits_per_byte(
  train: bytes, texts: list[bytes], compress: Callable[[bytes], bytes]
) -> float:
  """Returns what texts add to the compressed training text, in bits a byte.

  All texts come behind the training text as one, which favours the compressor:
  a model reads each by itself.
  """
  joined = b''.join(texts)
  # Compressors let other threads run: both at once.
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    both, alone = map(len, pool.map(compress, (train + joined, train)))
  return 8 * (both - alone) / len(joined)


def training_text(store: TokenStore, limit: int = PRIMED) -> bytes:
  """Returns the last bytes of the training documents, decoded."""
  # Four bytes a token, as a rule: more is decoded than is kept.
  tokens, tokenizer = store.train[-limit:], store.tokenizer()
  ends = np.flatnonzero(np.asarray(tokens) == store.eos_id)
  out, start = [], 0
  for end in ends:
    ids = [int(t) for t in tokens[start:end]]
    out.append(tokenizer.decode(ids).encode('utf-8', 'replace'))
    start = end + 1
  return b''.join(out)[-limit:]


def _compressors() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
  """Yields the compressors at hand, with windows that hold PRIMED bytes."""
  yield 'xz', lambda data: lzma.compress(data, preset=9)
  import pyarrow

  if pyarrow.Codec.is_available('zstd'):
    codec = pyarrow.Codec('zstd', compression_level=20)  # a window of 32 MiB
    yield 'zstd', lambda data: codec.compress(data, asbytes=True)


def bits_to_beat(heldout: Heldout, vocab_size: int) -> dict[str, float]:
  """Returns bits per byte of the held-out documents by code.

  'uniform', 'unigram', 'xz' (each file by itself), 'xz primed' and, where
  Arrow has it, 'zstd primed'. Kept beside the tokens: compressing them takes
  longer than a small model's validation.
  """
  path = Path(heldout.store.path) / FILE
  read = [heldout.store.heldout_sha256, vocab_size, PRIMED]
  key = json.dumps([*read, *(doc.offset for doc in heldout.documents)])
  try:
    kept = json.loads(path.read_text())
    if kept['of'] == key:
      return dict(kept['values'])
  except (OSError, ValueError, LookupError, TypeError):
    pass  # absent, or cut short: it is made anew
  out = _made(heldout, vocab_size)
  with contextlib.suppress(OSError), files.whole(path) as scratch:
    scratch.write_text(json.dumps({'of': key, 'values': out}))
  return out


def _made(heldout: Heldout, vocab_size: int) -> dict[str, float]:
  """Returns `bits_to_beat`, computed."""
  store, texts = heldout.store, heldout.store.heldout_texts()
  read = {doc.offset for doc in heldout.documents}
  everything = zip(store.heldout_documents(), texts)
  texts = [text for doc, text in everything if doc.offset in read]
  out = {
    'uniform': uniform_bits_per_byte(heldout, vocab_size),
    'unigram': unigram_bits_per_byte(heldout, vocab_size),
    'xz': xz_bits_per_byte(texts),
  }
  data, train = [text.encode() for text in texts], training_text(store)
  for name, compress in _compressors():
    out[f'{name} primed'] = primed_bits_per_byte(train, data, compress)
  return out
