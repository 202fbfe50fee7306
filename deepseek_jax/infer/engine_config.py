"""Describes what an engine holds, and in which shapes it computes.

Legend: P tokens of a page, N calls of a step, k drafts.
"""

import dataclasses

from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError

_TOGETHER = 4  # prompts of a chunk at most


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Describes what an engine holds, and in which shapes it computes.

  Attributes:
    slots: answers that are decoded together at most.
    context: tokens of a prompt and its answer together, at most.
    page: P; rounded up until whole rows of every layer's cache fit.
    pages: of the cache; None: as many as all slots can fill.
    budget: tokens of a chunk of prefill.
    prefills: chunks between two steps of decoding, at most. More fill the slots
      sooner and let answers that run wait longer.
    steps: N, calls of the model that a decoding step makes.
    drafts: k, tokens that multi-token prediction guesses for each call; the
      tokens that come out are the same. 0: none.
    draft_rows: with more rows in a bucket nothing is guessed, as the calls cost
      more than they spare; None: always.
    queue: answers that may wait; more are refused.
    reuse: prompts that begin alike share what is cached.
    snapshots: how many ends of pages keep what layers cache of the last tokens
      alone; None: two for each slot. Only models that need them have them.
    rows, contexts: buckets, ascending; None: one and all slots, a quarter of
      the context and all of it.
    chunks: (rows, tokens) of chunks of prefill, in place of `budget`; None: one
      prompt of an eighth of it, four of a quarter, one of the whole. More of
      them leave less padding and take longer to compile.
    deterministic: one bucket for everything and no shared prefixes, so that an
      answer doesn't depend on what else runs in any bit, as long as there are
      pages for all (`stats['preempted']` counts answers computed again).
    routing: keeps which experts answers chose.
    kept: keeps which tokens top_k, top_p and the like left to each draw, a bit
      for each of the vocabulary.
  """

  slots: int = 16
  context: int = 2048
  page: int = 64
  pages: int | None = None
  budget: int = 256
  prefills: int = 4
  steps: int = 8
  drafts: int = 0
  draft_rows: int | None = None
  queue: int = 256
  reuse: bool = True
  snapshots: int | None = None
  rows: tuple[int, ...] | None = None
  contexts: tuple[int, ...] | None = None
  chunks: tuple[tuple[int, int], ...] | None = None
  deterministic: bool = False
  routing: bool = False
  kept: bool = False

  def __post_init__(self) -> None:
    """Raises InputError for a field out of its range."""
    at_least(self, 'engine.', slots=1, context=2, page=1, pages=1, budget=1)
    at_least(self, 'engine.', prefills=1, steps=1, queue=1, snapshots=0)
    at_least(self, 'engine.', drafts=0, draft_rows=0)
    for name, least in (('rows', self.slots), ('contexts', self.context)):
      given = getattr(self, name)
      if given is None:
        continue
      if not given or list(given) != sorted(set(given)) or given[0] < 1:
        raise InputError(
          f'engine.{name} = {given!r}: must be ascending numbers from 1'
        )
      if given[-1] < least:
        raise InputError(
          f'engine.{name} = {given!r}: the last must be at least {least}'
        )
    if self.chunks is not None and not (
      self.chunks and all(map(_is_pair, self.chunks))
    ):
      raise InputError(
        f'engine.chunks = {self.chunks!r}: must be pairs of whole numbers from'
        ' 1, rows and tokens of a chunk'
      )

  def row_buckets(self) -> tuple[int, ...]:
    """Returns the numbers of rows that are compiled."""
    if self.deterministic:
      return (self.slots,)
    return self.rows or tuple(sorted({1, self.slots}))

  def page_buckets(self, page: int) -> tuple[int, ...]:
    """Returns the numbers of pages of a row that are compiled."""
    whole = self.contexts or (-(-self.context // 4), self.context)
    if self.deterministic:
      whole = whole[-1:]
    return tuple(sorted({-(-tokens // page) for tokens in whole}))

  def chunk_buckets(self) -> tuple[tuple[int, int], ...]:
    """Returns the (rows, tokens) of prefill that are compiled."""
    # No prompt is longer than the context.
    most = min(self.budget, self.context)
    if self.deterministic:
      return ((1, most),)
    if self.chunks:
      fits = lambda rows, tokens: (
        min(rows, self.slots),
        min(tokens, self.context),
      )
      return tuple(dict.fromkeys(fits(*chunk) for chunk in self.chunks))
    # One short prompt, a few, a long one; the last two cost about the same.
    several = min(self.slots, _TOGETHER)
    short, middle = max(1, most // 8), max(1, most // _TOGETHER)
    return tuple(dict.fromkeys([(1, short), (several, middle), (1, most)]))

  def drafts_of(self, rows: int) -> int:
    """Returns how many tokens are guessed with so many rows."""
    return self.drafts if rows <= self.most_drafted() else 0

  def most_drafted(self) -> int:
    """Returns with how many rows in a bucket something is guessed, at most."""
    if self.draft_rows is None:
      return self.row_buckets()[-1]
    return self.draft_rows


def _is_pair(chunk: object) -> bool:
  """Returns whether it is rows and tokens of a chunk."""
  whole = lambda one: type(one) is int and one > 0
  return isinstance(chunk, tuple) and len(chunk) == 2 and all(map(whole, chunk))
