"""Applies one rule for equal scores on both sides of a comparison.

An indexer's scores are sums of ReLUs: many are exactly 0, so the border of a
top-k often runs between equal scores. Here the lowest position wins; torch.topk
takes any of them.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def lowest_first() -> Iterator[collections.Counter]:
  """Makes torch.topk take the lowest of equal positions inside the context.

  Yields a counter: 'tied' is how many choices had equal scores on both sides
  of their border, of 'choices' that left anything out.
  """
  import torch

  seen = collections.Counter()
  plain = torch.topk

  def topk(
    x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
  ) -> Any:
    if not largest:
      return plain(x, k, dim, largest, sorted)
    order = torch.sort(x, dim=dim, descending=True, stable=True)
    values, places = (a.movedim(dim, -1) for a in order)
    if k < x.shape[dim]:
      last, next_ = values[..., k - 1], values[..., k]
      real = torch.isfinite(next_)
      seen['choices'] += int(real.sum())
      seen['tied'] += int((real & (last == next_)).sum())
    cut = [a[..., :k].movedim(-1, dim) for a in (values, places)]
    return torch.return_types.topk(cut)

  with (
    mock.patch.object(torch, 'topk', topk),
    mock.patch.object(torch.Tensor, 'topk', topk),
  ):
    yield seen
