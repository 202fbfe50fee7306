"""Gives pages to requests, and finds those that others have filled before.

A full page is known by a hash of its tokens and of all before it, so equal
beginnings of requests are stored once. With drafts the hash is of the token
after, too: on that one rests what multi-token prediction caches of the last. A
page that no request uses any more stays until its place is needed, the longest
unused first. Pure host code.
Legend: P tokens of a page.
"""

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

SCRATCH = 0  # the page of table entries that stand for none; never written


def chain(
  tokens: Sequence[int],
  page: int,
  salt: str,
  known: Sequence[bytes] = (),
  ahead: int = 0,
) -> list[bytes]:
  """Returns a 128-bit hash for each full page of tokens and all before it.

  Args:
    tokens: of a request.
    page: P.
    salt: what else must be equal: weights, dtype of the cache, tenant.
    known: the hashes of its first pages.
    ahead: tokens after a page on which it rests, too.
  """
  out = list(known)
  before = hashlib.blake2b(salt.encode(), digest_size=16).digest()
  before = out[-1] if out else before
  size = page + ahead
  for start in range(len(out) * page, len(tokens) - size + 1, page):
    part = np.asarray(tokens[start : start + size], np.int32).tobytes()
    before = hashlib.blake2b(before + part, digest_size=16).digest()
    out.append(before)
  return out


class Pages:
  """Counts who uses which page, and knows full pages by their hash.

  Attributes:
    total: pages that can be given, without the scratch page.
  """

  def __init__(self, total: int):
    """Makes `total` pages, numbered from 1."""
    self.total = total
    self._free = collections.deque(range(1, total + 1))
    self._users: dict[int, int] = {}
    self._known: dict[bytes, int] = {}  # full pages
    self._hash: dict[int, bytes] = {}
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

  @property
  def free(self) -> int:
    """Returns how many pages can be given: empty ones and idle ones."""
    return len(self._free) + len(self._idle)

  def take(self, count: int) -> list[int] | None:
    """Returns `count` pages for a request; None if there are too few."""
    if count > self.free:
      return None
    out = []
    for _ in range(count):
      if self._free:
        page = self._free.popleft()
      else:  # the longest unused
        page, _ = self._idle.popitem(last=False)
        del self._known[self._hash.pop(page)]
      self._users[page] = 1
      out.append(page)
    return out

  def found(self, hashes: Iterable[bytes]) -> list[int]:
    """Returns the pages of the longest known beginning, without taking them."""
    out = []
    for digest in hashes:
      page = self._known.get(digest)
      if page is None:
        break
      out.append(page)
    return out

  def share(self, pages: Iterable[int]) -> None:
    """Counts one more user of pages that were found."""
    for page in pages:
      self._idle.pop(page, None)
      self._users[page] = self._users.get(page, 0) + 1

  def name(self, page: int, digest: bytes) -> None:
    """Makes a full page known; one that is known already stays."""
    if digest not in self._known and page not in self._hash:
      self._known[digest] = page
      self._hash[page] = digest

  def release(self, pages: Iterable[int]) -> None:
    """Takes pages back from one user; last ones first, so they go first."""
    for page in reversed(list(pages)):
      self._users[page] -= 1
      if self._users[page]:
        continue
      del self._users[page]
      if page in self._hash:
        self._idle[page] = None
      else:
        self._free.append(page)

  def forget(self) -> None:
    """Forgets all known pages: what they hold is of other weights."""
    self._free.extend(self._idle)
    self._idle.clear()
    self._known.clear()
    self._hash.clear()


class Snapshots:
  """Knows which spare slots hold the rings at the end of which full page."""

  def __init__(self, slots: Iterable[int]):
    """Takes the numbers of the spare slots."""
    self._free = list(slots)
    self._known: collections.OrderedDict[bytes, int] = collections.OrderedDict()

  def found(self, digest: bytes) -> int | None:
    """Returns the slot of a snapshot, or None."""
    slot = self._known.get(digest)
    if slot is not None:
      self._known.move_to_end(digest)
    return slot

  def take(self, digest: bytes) -> int | None:
    """Returns a slot for a new snapshot, the longest unused one if need be.

    None if it is known already, or there are no spare slots.
    """
    if digest in self._known:
      return None
    if self._free:
      slot = self._free.pop()
    elif self._known:
      _, slot = self._known.popitem(last=False)
    else:
      return None
    self._known[digest] = slot
    return slot

  def forget(self) -> None:
    """Forgets all snapshots."""
    self._free.extend(self._known.values())
    self._known.clear()
