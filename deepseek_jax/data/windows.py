"""Tokenises once: a corpus becomes a store of token windows on disk.

The store's folder is named by a hash of all that decides its tokens, so runs
that agree share it and a change of the text or of a setting makes a new one.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from deepseek_jax import say as say_lib
from deepseek_jax.data import corpus, infill, leftovers
from deepseek_jax.data import token_store as store
from deepseek_jax.data import tokenizer as tokenizer_lib
from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.data.census import Census, census_of
from deepseek_jax.data.config import MARK, DataConfig
from deepseek_jax.errors import InputError

_BPE_CHARACTERS = 1 << 26  # a larger corpus is sampled to train the BPE on
_BATCH_CHARACTERS = 1 << 22  # encoded at once: bounds the memory


def build(
  config: DataConfig, *, say: Callable[[str], None] = say_lib.warn
) -> store.TokenStore:
  """Returns the token windows of a config, from the cache if they are there.

  Reads the corpus to hash it, tokenises it unless that was done before, and
  verifies the store.

  Args:
    config: the data of a run.
    say: takes a line on files of data.path that are not read.

  Raises:
    InputError: an input or the cached store is wrong.
  """
  census = census_of(config)
  if census.left_out:
    say(census.left_out)
  recipe = _recipe(config, census)
  text = json.dumps(recipe, sort_keys=True)
  key = hashlib.sha256(text.encode()).hexdigest()[:20]
  path = os.path.join(config.cache(), 'tokens', key)
  if not os.path.exists(path):
    _write(path, config, census, recipe)
  out = store.TokenStore.open(path, config.vocab_size)
  if out.index['recipe'] != recipe:
    raise InputError(
      f'{path} was built from another corpus or setting: '
      'delete it and run again'
    )
  return out


def _recipe(config: DataConfig, census: Census) -> dict:
  """Returns all that decides the tokens of a store."""
  tokenizer = config.tokenizer
  if tokenizer == 'bpe':
    tokenizer = f'bpe {config.vocab_size}'
  elif tokenizer != 'bytes':
    tokenizer = tokenizer_lib.from_file(tokenizer).sha256
  return {
    'format': store.FORMAT,
    'corpus_sha256': census.sha256,
    'tokenizer': tokenizer,
    'heldout_fraction': config.heldout_fraction,
    'heldout_by': 'text',  # by name in earlier versions
    'fim_rate': config.fim_rate,
    'fim_seed': config.seed if config.fim_rate else None,
    # Their weights do not matter here: only the order of reading has them.
    **({'sources': list(config.paths)} if config.sources else {}),
  }


def _write(path: str, config: DataConfig, census: Census, recipe: dict) -> None:
  """Builds in a folder beside `path` and renames it: all of it or nothing."""
  tokenizer = _tokenizer(config, census)
  folder = f'{path}.{secrets.token_hex(4)}.tmp'
  leftovers.remove(os.path.dirname(path))
  try:
    os.makedirs(folder)
    index, sha256 = _write_tokens(folder, config, tokenizer)
    if sha256 != census.sha256:
      raise InputError(
        f'data.path={config.path!r} changed while it was read: run again'
      )
    tokenizer.save(folder)
    about = {'recipe': recipe, 'corpus_files': census.files}
    store.write_index(folder, index | about)
    _publish(folder, path)
  except OSError as error:
    raise InputError(
      f'data.cache_dir={config.cache()!r}: cannot write there '
      f'({error.strerror}); choose another'
    ) from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: str, path: str) -> None:
  """Renames a finished folder; another process may have been faster."""
  try:
    os.rename(folder, path)
  except OSError:
    if not os.path.exists(path):  # else another process was faster
      raise


def _tokenizer(
  config: DataConfig, census: Census
) -> tokenizer_lib.Tokenizer | tokenizer_lib.ByteTokenizer:
  """Returns the tokenizer of a config, trained or loaded."""
  if config.tokenizer == 'bpe':
    out = train_bpe(_bpe_texts(config, census), config.vocab_size)
  elif config.tokenizer == 'bytes':
    out = tokenizer_lib.ByteTokenizer()
  else:
    out = tokenizer_lib.from_file(config.tokenizer)
  if out.vocab_size > config.vocab_size:
    raise InputError(
      f'data.vocab_size={config.vocab_size}: the tokenizer '
      f'{config.tokenizer!r} has {out.vocab_size} tokens; set it to that'
    )
  if config.fim_rate and out.fim is None:
    raise InputError(
      f'data.fim_rate={config.fim_rate}: the tokenizer {config.tokenizer!r} '
      'has no fill-in-the-middle tokens; set it to 0'
    )
  return out


def _bpe_texts(config: DataConfig, census: Census) -> Iterator[str]:
  """Yields the training documents, or a sample if they are very many."""
  share = _BPE_CHARACTERS / max(census.characters, 1)
  for doc in corpus.documents_of(config):
    held = corpus.is_held_out(doc.text, config.heldout_fraction)
    if not held and corpus.unit_hash('bpe', doc.name) < share:
      yield doc.text


def _write_tokens(
  folder: str,
  config: DataConfig,
  tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.ByteTokenizer,
) -> tuple[dict, str]:
  """Writes both token files; returns the index's counts and the corpus hash."""
  dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
  digest = corpus.Digest()
  train = {'documents': 0, 'tokens': 0, 'bytes': 0, 'fim_documents': 0}
  heldout, sources = [], dict.fromkeys(config.paths, 0)
  with (
    open(os.path.join(folder, store.TRAIN), 'wb') as train_file,
    open(os.path.join(folder, store.HELDOUT), 'wb') as heldout_file,
  ):
    for doc, held, cut, ids in _encoded(config, tokenizer):
      digest.add(doc)
      ids = np.asarray([*ids, tokenizer.eos_id], dtype)
      size = len(doc.text.encode())
      (heldout_file if held else train_file).write(ids.tobytes())
      if held:
        heldout.append((doc.name, len(ids), size))
      else:
        train['documents'] += 1
        train['tokens'] += len(ids)
        train['bytes'] += size
        train['fim_documents'] += cut
        source = doc.name.partition(MARK)[0] if config.sources else config.path
        sources[source] += len(ids)
  index = {
    'corpus': config.path,
    'dtype': dtype.str,
    'tokenizer': {
      name: getattr(tokenizer, name)
      for name in ('kind', 'sha256', 'vocab_size', 'eos_id', 'pad_id')
    },
    'train': train,
    'sources': sources,  # -> training tokens, in the order of the file
    'heldout': {
      'documents': len(heldout),
      'tokens': sum(tokens for _, tokens, _ in heldout),
      'bytes': sum(size for _, _, size in heldout),
      'list': heldout,
    },
  }
  return index, digest.hexdigest()


def _encoded(
  config: DataConfig,
  tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.ByteTokenizer,
) -> Iterator[tuple]:
  """Yields (document, held out, whether cut, ids without EOS), in order."""
  for docs in _batched(corpus.documents_of(config)):
    plans = []
    for doc in docs:
      held = corpus.is_held_out(doc.text, config.heldout_fraction)
      cut = None if held else infill.fim(doc, config.fim_rate, config.seed)
      plans.append((doc, held, cut))
    # All parts at once, for encode_batch runs on all cores.
    texts = [text for doc, _, cut in plans for text in cut or (doc.text,)]
    ids = iter(tokenizer.encode_batch(texts))
    for doc, held, cut in plans:
      parts = [next(ids) for _ in cut or (doc.text,)]
      check_ids(doc, parts, tokenizer, exact=held)
      body = infill.arrange(parts, tokenizer.fim) if cut else parts[0]
      yield doc, held, cut is not None, body


def check_ids(
  doc: corpus.Document,
  parts: list[list[int]],
  tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.ByteTokenizer,
  *,
  exact: bool,
  name: str = 'data.tokenizer',
) -> None:
  """Raises InputError if tokens hold an end of text or change the text.

  Args:
    doc: the document.
    parts: its tokens, or those of its parts.
    tokenizer: that made them.
    exact: whether the first of `parts` has to mean all of the text.
    name: of the tokenizer, for messages.
  """
  if any(tokenizer.eos_id in ids for ids in parts):
    raise InputError(
      f'{name} reads an end of text inside {doc.name}: take that out'
    )
  # Bits per byte count bytes of the text, so its tokens have to mean them all.
  if exact and tokenizer.decode(parts[0]) != doc.text:
    raise InputError(
      f'{name} does not give {doc.name} back exactly: '
      'use a byte-level tokenizer'
    )


def _batched(
  docs: Iterable[corpus.Document],
) -> Iterator[list[corpus.Document]]:
  """Yields lists of documents of some 4 million characters together."""
  batch, characters = [], 0
  for doc in docs:
    batch.append(doc)
    characters += len(doc.text)
    if characters >= _BATCH_CHARACTERS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch
