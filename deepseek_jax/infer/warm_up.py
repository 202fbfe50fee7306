"""Compiles all programs of an engine before its first request."""

import time
from collections.abc import Callable

import jax

from deepseek_jax.infer import host_arrays
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.host_arrays import Ahead, Bucket
from deepseek_jax.infer.paging import Store
from deepseek_jax.infer.programs import Programs
from deepseek_jax.infer.sampler import words


def warm_up(
  run: Programs,
  variables: dict,
  store: Store,
  cfg: EngineConfig,
  page: int,
  vocab: int,
  grammars: bool,
  say: Callable[[str], None] | None = None,
) -> Store:
  """Runs every program on rows that are no request.

  Args:
    run, variables, store: of the engine; the store is donated.
    cfg, page, vocab: tokens of a page and of the vocabulary.
    grammars: whether answers may have to follow any.
    say: takes a line for each program.

  Returns:
    The store, in which nothing has changed.
  """
  shapes = _shapes(cfg, page, grammars)
  for number, (what, bucket) in enumerate(shapes, 1):
    begun = time.monotonic()
    where = host_arrays.rows([], bucket, [])
    if what == 'prefill':
      args = (host_arrays.chunk([], bucket, [], cfg.drafts),)
    else:
      ahead = Ahead(cfg.steps, cfg.drafts_of(bucket.rows), words(vocab))
      going = host_arrays.going([], bucket, [], ahead)
      args = going, host_arrays.draws([], bucket, page, vocab)
    store, *out = getattr(run, what)(variables, store, where, *args)
    jax.block_until_ready(out)
    if say is not None:
      say(
        f'compiled {number}/{len(shapes)}: {what}, {bucket.rows} x'
        f' {bucket.tokens} tokens, context {bucket.pages * page}'
        f' ({time.monotonic() - begun:.1f} s)'
      )
  return store


def _shapes(
  cfg: EngineConfig, page: int, grammars: bool
) -> list[tuple[str, Bucket]]:
  """Returns the shapes of all programs."""
  shapes = []
  for pages in cfg.page_buckets(page):
    for rows in cfg.row_buckets():
      shapes.append(('decode', Bucket(rows, 1, pages)))
      if grammars and cfg.drafts_of(rows):
        shapes.append(('draft', Bucket(rows, 1, pages)))
    for rows, tokens in cfg.chunk_buckets():
      if tokens <= pages * page:
        shapes.append(('prefill', Bucket(rows, tokens, pages)))
  return shapes
