"""Shows pictures and trees in a notebook, and curves that grow with a run.

A picture comes with a text for those who do not see it. Outside of a notebook
pictures open matplotlib's windows, trees are printed, and curves do not grow.
"""

import base64
import html
import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.errors import InputError, told
from deepseek_jax.record import metrics

_WORDS = 4  # of a text that says what a picture shows, at least
_MEAN = 5  # steps of a running mean


def _display() -> Callable[..., Any] | None:
  """Returns IPython's `display` in a notebook's kernel, else None."""
  ipython = sys.modules.get('IPython')
  shell = ipython.get_ipython() if ipython else None
  if not hasattr(shell, 'kernel'):  # a terminal shows text alone
    return None
  from IPython.display import display

  return display


def bundle(figure: Any, alt: str) -> tuple[dict, dict]:
  """Returns what a notebook stores of a picture: its data, and their metadata.

  Args:
    figure: of matplotlib.
    alt: what a reader who does not see it is told.

  Raises:
    InputError: it is no figure, or `alt` says nothing.
  """
  if not hasattr(figure, 'savefig'):
    raise InputError(f'figure: is {told(figure)}; give a matplotlib figure')
  if not isinstance(alt, str) or len(alt.split()) < _WORDS:
    raise InputError(
      f'alt = {alt!r}: must say what the picture shows, in {_WORDS} words or'
      ' more'
    )
  stream = io.BytesIO()
  figure.savefig(stream, format='png', dpi=110, bbox_inches='tight')
  image = base64.b64encode(stream.getvalue()).decode()
  # Few frontends read the metadata, so the text is in HTML, which all prefer.
  said = html.escape(alt)
  source = f'data:image/png;base64,{image}'
  tag = f'<img alt="{said}" src="{source}" style="max-width: 100%">'
  data = {'text/html': tag, 'image/png': image, 'text/plain': alt}
  return data, {'image/png': {'alt': alt}}


def show_picture(figure: Any, alt: str) -> None:
  """Shows a matplotlib figure, with a text for those who do not see it.

  Args:
    figure: of matplotlib; in a notebook it is closed.
    alt: what it shows.

  Raises:
    InputError: `alt` says nothing.
  """
  from matplotlib import pyplot

  data, metadata = bundle(figure, alt)
  display = _display()
  if display is None:
    pyplot.show()
    return
  display(data, raw=True, metadata=metadata)
  pyplot.close(figure)  # or it would be shown once more, without the text


def show_tree(tree: Any) -> None:
  """Shows a configuration or variables: to be unfolded where treescope is.

  Elsewhere, and outside of a notebook, its text is printed.
  """
  if _display() is not None:
    try:
      import treescope
    except ImportError:
      pass
    else:
      treescope.display(tree)
      return
  print(repr(tree))


class LiveCurves:
  """Draws a metric of one run or several while they go, a line for each.

  live = ds.LiveCurves('reward')
  ds.fit(config, 'runs/a', writers=[live.line('a', 'runs/a')])
  """

  def __init__(self, name: str, *, every: float = 2.0):
    """Takes the metric's name, and the least seconds between two drawings."""
    if not isinstance(name, str) or not name:
      raise InputError(f'name: is {told(name)}; give a metric, as in reward')
    if isinstance(every, bool) or not isinstance(every, int | float):
      raise InputError(f'every: is {told(every)}; give seconds, as in 2.0')
    self.name, self._every = name, every
    self.lines: dict[str, dict[int, float]] = {}
    self._drawn, self._handle = 0.0, None

  def line(
    self, label: str, workdir: str | os.PathLike | None = None
  ) -> '_Line':
    """Returns the writer of a line, for `writers` of `ds.fit`.

    Args:
      label: names it in the picture.
      workdir: folder of a run; what it has written already is drawn, too.
    """
    values = self.lines.setdefault(label, {})
    if workdir is not None and os.path.isdir(workdir):
      for row in metrics.read(workdir):
        if self.name in row:
          values[row['step']] = row[self.name]
    return _Line(self, values)

  def alt(self) -> str:
    """Returns the picture in words: where each line begins and ends."""
    parts = [
      f'{label} goes from {series[min(series)]:.3g} at step {min(series)} to'
      f' {series[max(series)]:.3g} at step {max(series)}'
      for label, series in self.lines.items()
      if series
    ]
    return f'Curves of {self.name} by step: {"; ".join(parts) or "none yet"}.'

  def figure(self) -> Any:
    """Returns the picture: each line thin, and its running mean thick."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure((7, 3.6))
    axes = figure.subplots()
    for number, (label, series) in enumerate(self.lines.items()):
      steps = sorted(series)
      values = np.array([series[step] for step in steps], float)
      color = f'C{number}'
      axes.plot(steps, values, color=color, alpha=0.3, lw=1)
      width = min(_MEAN, len(values))
      if width:
        mean = np.convolve(values, np.ones(width) / width, 'valid')
        axes.plot(steps[width - 1 :], mean, color=color, label=label)
    axes.set(xlabel='step', ylabel=self.name)
    if self.lines:
      axes.legend(frameon=False)
    return figure

  def draw(self, *, now: bool = False) -> None:
    """Draws the lines in a notebook, in place of the last drawing.

    Args:
      now: even if the last drawing is not long ago.
    """
    display = _display()
    if display is None or not any(self.lines.values()):
      return
    if not now and time.monotonic() - self._drawn < self._every:
      return
    data, metadata = bundle(self.figure(), self.alt())
    if self._handle is None:
      how = {'raw': True, 'metadata': metadata}
      self._handle = display(data, display_id=True, **how)
    else:
      self._handle.update(data, raw=True, metadata=metadata)
    self._drawn = time.monotonic()


class _Line:
  """Takes the scalars of one run for a line of LiveCurves."""

  def __init__(self, curves: LiveCurves, values: dict[int, float]):
    """Takes the picture, and where its values go."""
    self._curves, self._values = curves, values

  def write(
    self, step: int, scalars: Mapping[str, float], timings: Mapping[str, float]
  ) -> None:
    """Adds the metric of a step, and draws if it is time."""
    found = {**timings, **scalars}
    if self._curves.name in found:
      self._values[step] = float(found[self._curves.name])
      self._curves.draw()

  def close(self) -> None:
    """Draws the run's last values."""
    self._curves.draw(now=True)
