"""Puts pictures of a browser's window side by side, as README shows them."""

import io
from collections.abc import Sequence

from PIL import Image

_GAP = 20  # pixels between pictures, and around them
_GROUND = (128, 134, 142)
_COLORS = 200  # the file's palette


def beside(shots: Sequence[bytes], path: str) -> None:
  """Writes PNG files side by side as one PNG file of few colours."""
  found = [Image.open(io.BytesIO(shot)).convert('RGB') for shot in shots]
  width = sum(one.width for one in found) + _GAP * (len(found) + 1)
  height = max(one.height for one in found) + 2 * _GAP
  whole = Image.new('RGB', (width, height), _GROUND)
  left = _GAP
  for one in found:
    whole.paste(one, (left, _GAP))
    left += one.width + _GAP
  few = whole.quantize(_COLORS, dither=Image.Dither.NONE)
  few.save(path, optimize=True)
