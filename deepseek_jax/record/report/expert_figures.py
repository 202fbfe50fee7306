"""Lays out figures of the experts: load, bias and balance, by layer and time.

Legend: N intervals, L MoE layers, E experts, G groups of neighbouring experts.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from deepseek_jax.record.report import curves, heatmaps, pixels, ticks

_CELLS = 160  # columns of a heatmap over time
_FINE = 16  # layers; of more, pictures are coarser, or the file grows
_VECTOR_POINTS = 20_000  # lines with more points in all become pixels
_LINES = (150, 300)  # height and width of such a picture
_NAMED = 8  # layers that a legend names one by one


def load_by_layer(share: np.ndarray, layers: Sequence[int]) -> heatmaps.Heatmap:
  """Returns a map of one interval: share [L E] in units of an even share."""
  picture, size = heatmaps.of_shares(share)
  each = [
    f'layer {layer} {_ends(row)}, most in expert {np.argmax(row)}'
    for layer, row in zip(layers[:_NAMED], share)
  ]
  more = ['and further layers'] if len(layers) > _NAMED else []
  return heatmaps.Heatmap(
    'experts of each layer',
    picture,
    size,
    heatmaps.cell_ticks(range(share.shape[1]), 16),
    heatmaps.upright(heatmaps.cell_ticks(layers, 16)),
    ('expert', 'layer'),
    f'Load of each expert by layer: {"; ".join([*each, *more])}.',
    {'map': 'last'},
  )


def load_over_time(
  share: np.ndarray, edges: np.ndarray, layers: Sequence[int]
) -> list[heatmaps.Heatmap]:
  """Returns a map of each layer: share [N L E], edges [N + 1] in steps."""
  pick = sample(edges, _CELLS if len(layers) <= _FINE else _CELLS // 4)
  axis = ticks.Axis(float(edges[0]), float(edges[-1]))
  experts = range(share.shape[2])
  out = []
  for n, layer in enumerate(layers):
    picture, size = heatmaps.of_shares(share[pick, n].T)
    out.append(
      heatmaps.Heatmap(
        f'layer {layer}',
        picture,
        size,
        ticks.ticks(axis, 4, whole=True),
        heatmaps.upright(heatmaps.cell_ticks(experts, 5)),
        ('step', 'expert'),
        f'Load of the experts of layer {layer} over the steps: at first'
        f' {_ends(share[0, n])}, at last {_ends(share[-1, n])}.',
        {'map': 'load', 'layer': n},
      )
    )
  return out


def chosen_together(
  lift: np.ndarray, layers: Sequence[int], experts: int
) -> list[heatmaps.Heatmap]:
  """Returns a map per layer: lift [L G G], 1 where pairs are as by chance.

  The groups are of neighbours among so many experts; a tick names the first.
  """
  count = lift.shape[-1]
  firsts = [-(-n * experts // count) for n in range(count)]
  groups = heatmaps.cell_ticks(firsts, 5)
  out = []
  for n, layer in enumerate(layers):
    picture, size = heatmaps.of_shares(lift[n])
    out.append(
      heatmaps.Heatmap(
        f'layer {layer}',
        picture,
        size,
        groups,
        heatmaps.upright(groups),
        ('expert', 'expert'),
        f'Pairs that are chosen together in layer {layer}, against chance:'
        f' {_ends(lift[n])}.',
        {'map': 'together', 'layer': n},
      )
    )
  return out


def lines_over_time(
  values: np.ndarray, steps: np.ndarray, layers: Sequence[int], name: str
) -> list[curves.Chart | heatmaps.Heatmap]:
  """Returns a line per expert, a chart per layer: values [N L E], steps [N].

  Experts are in the order of their last value, so that the hue reads as rank.
  Many lines become a picture, or the page would grow.
  """
  x, y = ticks.step_axis(steps), ticks.value_axis(values)._replace(log=False)
  axes = {'x': x._asdict(), 'y': y._asdict()}
  draw = _picture if values.size > _VECTOR_POINTS else _paths
  out = []
  for n, layer in enumerate(layers):
    ranked = values[:, n, np.argsort(values[-1, n])]
    summary = (
      f'{name} of every expert of layer {layer}, a line each: at first'
      f' {_ends(values[0, n])}, at last {_ends(values[-1, n])}.'
    )
    frame = curves.Chart(
      f'layer {layer}',
      [],
      curves.across(steps, 4),
      ticks.ticks(y, 4),
      [],
      summary,
      {'map': 'lines', 'array': name, 'layer': n, **axes},
    )
    out.append(draw(frame, x.place(steps), y.place(ranked)))
  return out


def _paths(
  frame: curves.Chart, places: np.ndarray, heights: np.ndarray
) -> curves.Chart:
  """Returns a chart with a line for each column of heights [N E]."""
  lines = []
  for column, hue in zip(heights.T, pixels.hexes(pixels.ranks(len(heights.T)))):
    keep = np.isfinite(column)
    path = curves.path(places[keep], column[keep])
    dot = f'{path}h0' if keep.sum() == 1 else ''
    lines.append(curves.Line('', '', hue, '', path, dot, ''))
  return frame._replace(lines=lines)


def _picture(
  frame: curves.Chart, places: np.ndarray, heights: np.ndarray
) -> heatmaps.Heatmap:
  """Returns the lines of `_paths` as a picture."""
  drawn = pixels.lines(places, heights.T, _LINES)
  colors = pixels.ranks(min(heights.shape[1], pixels.NONE))
  return heatmaps.Heatmap(
    frame.title,
    pixels.png(drawn, colors),
    _LINES[::-1],
    frame.across,
    frame.up,
    ('step', ''),
    frame.summary,
    frame.numbers,
    smooth=True,
  )


def layer_curves(
  panels: Mapping[str, np.ndarray], steps: np.ndarray, layers: Sequence[int]
) -> list[curves.Chart]:
  """Returns charts with a line per layer, whose hue is the layer.

  Args:
    panels: name -> values [N L], or [N 1] of the model.
    steps: [N].
    layers: [L] numbers of the layers.
  """
  out = []
  for name, values in panels.items():
    lines = values.shape[1]
    colors = pixels.hexes(pixels.ranks(lines)) if lines > 1 else ['']
    found = []
    for n, color in enumerate(colors):
      label = f'layer {layers[n]}' if lines > 1 else ''
      made = curves.averaged(curves.Series(label, steps, values[:, n]))
      found.append(made._replace(color=color))
    out.append(curves.chart(name, found))
  return out


def layer_keys(layers: Sequence[int]) -> list[tuple[str, str]]:
  """Returns the hue of each layer of `layer_curves`; of many, only the ends.

  The page's style draws what lies between as a gradient.
  """
  colors = pixels.hexes(pixels.ranks(len(layers)))
  keys = [(color, f'layer {layer}') for color, layer in zip(colors, layers)]
  return keys if len(keys) <= _NAMED else [keys[0], keys[-1]]


def sample(edges: np.ndarray, cells: int) -> np.ndarray:
  """Returns which interval lies under the centre of each of equally wide cells.

  Args:
    edges: [N + 1] steps at which intervals begin and end.
    cells: number of cells from the first edge to the last.

  Returns:
    [cells] int64.
  """
  centres = np.linspace(edges[0], edges[-1], 2 * cells + 1)[1::2]
  found = np.searchsorted(edges, centres, side='left') - 1
  return np.clip(found, 0, len(edges) - 2)


def _ends(values: np.ndarray) -> str:
  """Returns the least and the greatest of values as words."""
  finite = values[np.isfinite(values)]
  if not finite.size:
    return 'no value'
  return f'{curves.brief(finite.min())} to {curves.brief(finite.max())}'
