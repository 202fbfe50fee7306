"""Lays out heatmaps for a page: a small picture, ticks, a summary."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.record.report import pixels, ticks

EVEN = 2.0  # shares of an even load at which a map is brightest


class Heatmap(NamedTuple):
  """Holds what the page's template draws of a map.

  Attributes:
    title: headline of the map.
    picture: a PNG file in base64, a pixel for each cell.
    size: (columns, rows) of the picture.
    across: ticks of the columns.
    up: ticks of the rows, the first row at 100 percent.
    names: of columns and rows.
    summary: what a reader hears who does not see the map.
    numbers: tells the page's script where the values are.
    smooth: the picture is of lines, not of cells.
  """

  title: str
  picture: str
  size: tuple[int, int]
  across: list[ticks.Tick]
  up: list[ticks.Tick]
  names: tuple[str, str]
  summary: str
  numbers: dict[str, Any]
  smooth: bool = False

  @property
  def widest(self) -> str:
    """Returns the longest label beside the vertical axis, which takes room."""
    return max((tick.label for tick in self.up), key=len, default='')


def of_shares(shares: np.ndarray) -> tuple[str, tuple[int, int]]:
  """Returns the picture of shares [rows, columns], and its size."""
  picture = pixels.png(pixels.codes(shares, 0.0, EVEN), pixels.viridis())
  return picture, shares.shape[::-1]


def cell_ticks(names: Sequence[int], most: int = 8) -> list[ticks.Tick]:
  """Returns ticks in the middle of cells that have these names."""
  count = len(names)
  stride = next(
    s
    for n in range(9)
    for s in (10**n, 2 * 10**n, 4 * 10**n, 5 * 10**n)
    if -(-count // s) <= most
  )
  return [
    ticks.Tick(
      round(100 * (n + 0.5) / count, 3), str(names[n]), n // stride % 2 == 1
    )
    for n in range(0, count, stride)
  ]


def upright(found: Sequence[ticks.Tick]) -> list[ticks.Tick]:
  """Returns ticks of rows that begin at the top."""
  return [tick._replace(place=round(100 - tick.place, 3)) for tick in found]
