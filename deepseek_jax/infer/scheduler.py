"""Decides which requests run next, and which pages they have.

Requests come first in, first served. One that finds no page for its next token
takes those of the youngest, which waits at the front and is computed again:
its tokens are the same, as each is drawn by its seed and position alone. Pure
host code.
Legend: P tokens of a page, L tokens of a sequence.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from deepseek_jax.infer.pages import Pages, Snapshots, chain
from deepseek_jax.infer.request import LogProb, Request
from deepseek_jax.infer.sampler import Settings


@dataclasses.dataclass(eq=False)
class Sequence:
  """Holds one answer in the making.

  Attributes:
    request, id, index: what it answers; the engine's number of the request;
      which of its n answers.
    settings: how its tokens are drawn.
    buffer: [context] int32, prompt and answer.
    length: L, tokens of the buffer so far.
    cached: tokens in the cache; L - 1 when it decodes, as its last token is
      written when the next one is drawn.
    slot: its place among decoding rows; None while it waits.
    pages: in order.
    named: pages that are known by their hash.
    reused: tokens of the prompt that a shared prefix spared.
    text: of its tokens, or None.
    matcher: of its grammar, or None.
    allowed: [ceil(V / 32)] int32, what its grammar lets come next, or None.
    scores: log-probabilities of the prompt, with echo, until they are given.
    experts: [L_moe, E] counts of the answer's choices, if they are kept.
    routes: [context, L_moe, K] experts of each token, -1 where not known; None
      before the first, or where the request asks for none.
    drafts: how many were accepted, how many rejected.
    hashes: of its first full pages.
  """

  request: Request
  id: int
  index: int
  settings: Settings
  buffer: np.ndarray
  length: int
  salt: str
  cached: int = 0
  slot: int | None = None
  pages: list[int] = dataclasses.field(default_factory=list)
  named: int = 0
  reused: int = 0
  text: Any = None
  matcher: Any = None
  allowed: np.ndarray | None = None
  scores: list[LogProb | None] = dataclasses.field(default_factory=list)
  experts: Any = None
  routes: np.ndarray | None = None
  drafts: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
  hashes: list[bytes] = dataclasses.field(default_factory=list)

  @property
  def prompt(self) -> int:
    """Returns the number of the prompt's tokens."""
    return len(self.request.prompt)

  @property
  def answered(self) -> int:
    """Returns the number of the answer's tokens so far."""
    return self.length - self.prompt

  @property
  def left(self) -> int:
    """Returns how many tokens may still be drawn."""
    most = self.request.max_new_tokens - self.answered
    return min(most, len(self.buffer) - self.length)

  @property
  def to_prefill(self) -> int:
    """Returns how many tokens are cached before it decodes."""
    return self.length - 1 - self.cached

  def hashed(self, pages: int, page: int, ahead: int) -> list[bytes]:
    """Returns the hashes of the first pages; `page` and `ahead` as in `chain`.

    Of what is cached all pages have one: the token after it is known.
    """
    if len(self.hashes) < pages:
      tokens = self.buffer[: pages * page + ahead]
      self.hashes = chain(tokens, page, self.salt, self.hashes, ahead)
    return self.hashes[:pages]


class Scheduler:
  """Holds waiting and running sequences, and who has which page.

  Attributes:
    waiting: in order of arrival.
    running: the same, those with a slot.
    preempted: how often one had to give its pages up.
  """

  def __init__(
    self,
    page: int,
    pages: int,
    slots: int,
    *,
    snapshots: int = 0,
    reuse: bool = True,
    rings: bool = False,
    ahead: int = 0,
  ):
    """Makes an empty schedule.

    Args:
      page: P.
      pages: of the store, without the scratch page.
      slots: sequences that run together at most.
      snapshots: spare slots for rings at the ends of pages.
      reuse: whether prefixes are shared.
      rings: whether the model caches anything by slot.
      ahead: tokens after a page on which it rests, too: 1 with drafts.
    """
    self.page, self.reuse, self.rings = page, reuse, rings
    self.ahead = ahead
    self.pages = Pages(pages)
    self.snapshots = Snapshots(range(slots, slots + snapshots))
    self.waiting: collections.deque[Sequence] = collections.deque()
    self.running: list[Sequence] = []
    self.preempted = 0
    self._slots = list(range(slots))[::-1]

  def pages_for(self, tokens: int) -> int:
    """Returns how many pages so many tokens take."""
    return -(-tokens // self.page)

  def admit(self) -> list[tuple[Sequence, int | None]]:
    """Gives slots and pages to sequences that wait, in order.

    Returns:
      Those that run from now on, each with the slot of the snapshot that its
      rings go on from, or None.
    """
    out = []
    while self.waiting and self._slots:
      one = self.waiting[0]
      found, snapshot = self._prefix(one)
      # Found pages first: they must not be given away for the rest.
      self.pages.share(found)
      more = self.pages.take(self.pages_for(one.length) - len(found))
      if more is None:
        self.pages.release(found)
        break
      self.waiting.popleft()
      one.slot, one.pages = self._slots.pop(), found + more
      one.named, one.cached = len(found), len(found) * self.page
      if one.answered == 0:
        one.reused = one.cached
      self.running.append(one)
      out.append((one, snapshot))
    return out

  def _prefix(self, one: Sequence) -> tuple[list[int], int | None]:
    """Returns the known pages of a sequence's beginning, and their snapshot.

    One token at least is left to compute.
    """
    if not self.reuse or (one.request.echo and not one.answered):
      return [], None
    most = (one.length - 1) // self.page
    hashes = one.hashed(most, self.page, self.ahead)
    found = self.pages.found(hashes)
    if not self.rings:
      return found, None
    # Rings are known at some ends of pages only.
    for count in range(len(found), 0, -1):
      slot = self.snapshots.found(hashes[count - 1])
      if slot is not None:
        return found[:count], slot
    return [], None

  def grow(self, one: Sequence, tokens: int) -> bool:
    """Gives pages to a running sequence for so many tokens in all.

    The youngest sequences lose theirs if need be; False if it lost its own.
    """
    need = self.pages_for(tokens) - len(one.pages)
    while need > 0:
      more = self.pages.take(need)
      if more is not None:
        one.pages += more
        break
      youngest = self.running[-1]
      self.preempt(youngest)
      if youngest is one:
        return False
    return True

  def preempt(self, one: Sequence) -> None:
    """Takes a sequence's pages and slot; it will be computed again."""
    self._take_back(one)
    one.cached = 0
    self.waiting.appendleft(one)
    self.preempted += 1

  def end(self, one: Sequence) -> None:
    """Takes a sequence out, wherever it is."""
    if one.slot is None:
      self.waiting.remove(one)
    else:
      self._take_back(one)

  def _take_back(self, one: Sequence) -> None:
    """Frees what a running sequence has."""
    self.running.remove(one)
    self.pages.release(one.pages)
    self._slots.append(one.slot)
    one.slot, one.pages, one.named = None, [], 0

  def border(self, one: Sequence) -> int | None:
    """Returns the next token count at which rings are worth keeping, or None.

    While it prefills the last end of a page, then each one.
    """
    if not (self.rings and self.reuse):
      return None
    if one.to_prefill:
      last = (one.length - 1) // self.page * self.page
      return last if last > one.cached else None
    return (one.cached // self.page + 1) * self.page

  def next_chunk(
    self, shapes: Iterable[tuple[int, int]]
  ) -> tuple[list[Sequence], tuple[int, int]]:
    """Returns which sequences to prefill next, and in which shape.

    The oldest is always among them. The shape is the one that caches most
    tokens, the smallest of several.

    Args:
      shapes: (rows, tokens) of a chunk.
    """
    waiting = [s for s in self.running if s.to_prefill]

    def worth(shape: tuple[int, int]) -> tuple[int, int]:
      rows, tokens = shape
      useful = sum(self.chunk(s, tokens) for s in waiting[:rows])
      return useful, -rows * tokens

    best = max(shapes, key=worth)
    return waiting[: best[0]], best

  def chunk(self, one: Sequence, most: int) -> int:
    """Returns how many tokens of a prefilling sequence to cache next."""
    count = min(one.to_prefill, most)
    border = self.border(one)
    return count if border is None else min(count, border - one.cached)

  def name(self, one: Sequence) -> int | None:
    """Makes a sequence's full pages known.

    Returns:
      The slot where its rings are worth keeping now, or None.
    """
    full, inside = divmod(one.cached, self.page)
    # What rests on the token after a page is written with that token.
    whole = max(one.named, (one.cached - self.ahead) // self.page)
    if not self.reuse or (whole == one.named and inside):
      return None
    hashes = one.hashed(full, self.page, self.ahead)
    for place in range(one.named, whole):
      self.pages.name(one.pages[place], hashes[place])
    one.named = whole
    if self.rings and full and not inside:
      return self.snapshots.take(hashes[-1])
    return None

  def forget(self) -> None:
    """Forgets all prefixes, and computes what runs again: weights changed."""
    for one in reversed(list(self.running)):
      self.preempt(one)
    self.pages.forget()
    self.snapshots.forget()
