"""Makes small pictures: colours of numbers, PNG files, drawn lines."""

import base64
import functools
import struct
import zlib

import numpy as np

NONE = 255  # the code of what is no number; it is transparent
# Hues of one lightness, told from white and from black paper alike.
RANKS = ('#8a63d8', '#3f7fd6', '#178c9b', '#3f9143', '#a37a0b', '#d1592f')


@functools.cache
def viridis() -> np.ndarray:
  """Returns matplotlib's map from dark to bright, [NONE, 3] uint8."""
  from matplotlib import colormaps

  return colormaps['viridis'](np.linspace(0, 1, NONE), bytes=True)[:, :3]


@functools.cache
def ranks(count: int) -> np.ndarray:
  """Returns colours in the order of RANKS, [count, 3] uint8."""
  anchors = [[int(c[n : n + 2], 16) for n in (1, 3, 5)] for c in RANKS]
  places = np.linspace(0, len(anchors) - 1, count) if count > 1 else [0.0]
  known = np.arange(len(anchors))
  bands = [np.interp(places, known, band) for band in np.array(anchors).T]
  return np.round(np.stack(bands, axis=-1)).astype(np.uint8)


def hexes(colors: np.ndarray) -> list[str]:
  """Returns colours [n, 3] as '#rrggbb'."""
  return [f'#{bytes(color).hex()}' for color in colors]


def codes(values: np.ndarray, low: float, high: float) -> np.ndarray:
  """Returns numbers as uint8 from 0 (low) to 254 (high), NaN as NONE."""
  share = np.clip((values - low) / (high - low), 0, 1)
  found = np.where(np.isnan(values), NONE, np.round(share * (NONE - 1)))
  return found.astype(np.uint8)


def png(pixels: np.ndarray, colors: np.ndarray) -> str:
  """Returns an indexed picture [height, width] as a PNG file in base64.

  Args:
    pixels: uint8 places in `colors`; NONE is transparent.
    colors: [n, 3] uint8, n at most NONE.
  """

  def chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', check)

  height, width = pixels.shape
  palette = np.zeros((NONE + 1, 3), np.uint8)
  palette[: len(colors)] = colors
  alpha = b'\xff' * NONE + b'\0'
  rows = np.pad(pixels, ((0, 0), (1, 0)))  # each begins with its filter, none
  data = (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 3, 0, 0, 0))
    + chunk(b'PLTE', palette.tobytes())
    + chunk(b'tRNS', alpha)
    + chunk(b'IDAT', zlib.compress(rows.tobytes(), 9))
    + chunk(b'IEND', b'')
  )
  return base64.b64encode(data).decode()


def lines(
  places: np.ndarray, heights: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
  """Draws lines over each other; returns pixels, uint8.

  A pixel holds the place of its line's colour in `ranks(min(lines, NONE))`.

  Args:
    places: [points] shares of the width, rising.
    heights: [lines, points] shares of the height, 0 at the bottom.
    size: (height, width) of the picture.
  """
  height, width = size
  out = np.full(size, NONE, np.uint8)
  columns = np.linspace(0, 1, width)
  rows = np.arange(height)[:, None]
  for n, line in enumerate(heights):
    known = np.isfinite(line)
    if not known.any():
      continue
    y = np.interp(columns, places[known], line[known])
    y = np.round((1 - y) * (height - 1))
    # From where the last column ended, so that steep lines have no gaps.
    before = np.concatenate([y[:1], y[:-1]])
    low, high = np.minimum(y, before), np.maximum(y, before)
    color = n * min(len(heights), NONE) // len(heights)
    out[(rows >= low) & (rows <= high)] = color
  return out
