"""Pictures, trees and live curves, with a notebook's kernel stood in for."""

import base64
import sys
import tempfile
import types
from unittest import mock

import matplotlib
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.record import metrics, shown

matplotlib.use('Agg')


class _Kernel:
  """Keeps what is displayed, and what replaces it."""

  def __init__(self):
    self.new, self.updates = [], []

  def __call__(self, data, **how):
    self.new.append((data, how))
    return types.SimpleNamespace(
      update=lambda data, **how: self.updates.append((data, how))
    )

  def enter(self, test):
    test.enter_context(mock.patch.object(shown, '_display', lambda: self))
    return self


def _figure():
  from matplotlib import pyplot

  figure, axes = pyplot.subplots()
  axes.plot([1, 2])
  return figure


class PictureTest(parameterized.TestCase):
  def test_a_notebook_gets_image_and_text_once(self):
    from matplotlib import pyplot

    kernel, figure = _Kernel().enter(self), _figure()
    ds.show_picture(figure, 'A line that rises from 1 to 2.')
    [(data, how)] = kernel.new
    # What JupyterLab, Colab and nbconvert's HTML show.
    self.assertStartsWith(
      data['text/html'],
      '<img alt="A line that rises from 1 to 2." src="data:image/png;base64,',
    )
    self.assertStartsWith(base64.b64decode(data['image/png']), b'\x89PNG')
    self.assertEqual(data['text/plain'], 'A line that rises from 1 to 2.')
    self.assertEqual(how['metadata']['image/png']['alt'], data['text/plain'])
    self.assertTrue(how['raw'])
    # An open figure would be shown again at the end of its cell.
    self.assertFalse(pyplot.fignum_exists(figure.number))

  def test_elsewhere_a_window_opens(self):
    with mock.patch('matplotlib.pyplot.show') as show:
      ds.show_picture(_figure(), 'A line that rises from 1 to 2.')
    show.assert_called_once()

  def test_a_text_ends_no_attribute(self):
    data, _ = shown.bundle(_figure(), 'He said "a < b" & left.')
    said = '<img alt="He said &quot;a &lt; b&quot; &amp; left." src='
    self.assertStartsWith(data['text/html'], said)

  @parameterized.parameters('', 'plot', 'a b c', None, 3)
  def test_a_text_that_says_nothing_is_refused(self, alt):
    with self.assertRaisesRegex(ds.InputError, r'alt = .*: must say what'):
      ds.show_picture(_figure(), alt)

  def test_a_terminal_of_ipython_is_no_notebook(self):
    ipython = types.ModuleType('IPython')
    ipython.get_ipython = lambda: types.SimpleNamespace()
    with mock.patch.dict(sys.modules, {'IPython': ipython}):
      self.assertIsNone(shown._display())
    ipython.get_ipython = lambda: None
    with mock.patch.dict(sys.modules, {'IPython': ipython}):
      self.assertIsNone(shown._display())


class TreeTest(absltest.TestCase):
  def test_treescope_shows_it_in_a_notebook_and_its_text_is_printed_else(self):
    tree = {'a': (1, 2)}
    treescope = types.ModuleType('treescope')
    treescope.display = mock.Mock()
    with mock.patch.dict(sys.modules, {'treescope': treescope}):
      with mock.patch('builtins.print') as printed:
        ds.show_tree(tree)
      printed.assert_called_once_with(repr(tree))
      _Kernel().enter(self)
      ds.show_tree(tree)
    treescope.display.assert_called_once_with(tree)
    with (
      mock.patch.dict(sys.modules, {'treescope': None}),
      mock.patch('builtins.print') as printed,
    ):
      ds.show_tree(tree)
    printed.assert_called_once_with(repr(tree))


class LiveCurvesTest(absltest.TestCase):
  def test_grows_in_place_and_tells_where_lines_begin_and_end(self):
    kernel = _Kernel().enter(self)
    live = ds.LiveCurves('reward', every=0)
    writer = live.line('a')
    writer.write(1, {'loss': 3.0}, {})  # another metric's line
    self.assertEmpty(kernel.new)
    writer.write(1, {'reward': 0.25}, {'seconds': 1.0})
    writer.write(2, {'reward': 0.5}, {})
    writer.write(2, {'reward': 0.75}, {})  # the newest of a step counts
    writer.close()
    self.assertLen(kernel.new, 1)
    self.assertLen(kernel.updates, 3)
    data, how = kernel.updates[-1]
    text = (
      'Curves of reward by step: a goes from 0.25 at step 1 to 0.75 at step 2.'
    )
    self.assertEqual(data['text/plain'], text)
    self.assertEqual(how['metadata']['image/png']['alt'], text)

  def test_draws_no_more_often_than_asked_but_at_the_end(self):
    kernel = _Kernel().enter(self)
    live = ds.LiveCurves('seconds', every=1e9)
    writer = live.line('a')
    with mock.patch.object(shown.time, 'monotonic', lambda: 2e9):
      for step in range(1, 9):
        writer.write(step, {}, {'seconds': float(step)})
    self.assertLen(kernel.new, 1)
    self.assertEmpty(kernel.updates)
    writer.close()
    self.assertLen(kernel.updates, 1)

  def test_a_run_that_began_before_is_drawn_from_its_start(self):
    kernel = _Kernel().enter(self)
    with tempfile.TemporaryDirectory() as folder:
      with metrics.MetricsWriter(folder, console=False) as writer:
        writer.write(1, {'reward': 0.5})
        writer.write(2, {'loss': 0.5})
      live = ds.LiveCurves('reward')
      live.line('a', folder).close()
      live.line('none yet', f'{folder}/absent').close()
    self.assertEqual(live.lines, {'a': {1: 0.5}, 'none yet': {}})
    self.assertLen(kernel.new, 1)

  def test_outside_of_a_notebook_it_draws_nothing(self):
    live = ds.LiveCurves('reward')
    with mock.patch.object(live, 'figure') as drawn:
      writer = live.line('a')
      writer.write(1, {'reward': 1.0}, {})
      writer.close()
    drawn.assert_not_called()
    self.assertEqual(live.lines, {'a': {1: 1.0}})

  def test_not_finite_values_are_drawn_around(self):
    kernel = _Kernel().enter(self)
    live = ds.LiveCurves('loss', every=0)
    writer = live.line('a')
    for step, value in enumerate((1.0, float('nan'), float('inf'), 2.0)):
      writer.write(step, {'loss': value}, {})
    self.assertLen(kernel.updates, 3)

  def test_what_is_no_figure_and_no_seconds_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'figure: is 3; give a matplot'):
      ds.show_picture(3, 'A line that rises from 1 to 2.')
    with self.assertRaisesRegex(ds.InputError, "every: is '2'; give seconds"):
      ds.LiveCurves('reward', every='2')

  def test_a_name_that_is_none_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'name: is 3; give a metric'):
      ds.LiveCurves(3)


if __name__ == '__main__':
  absltest.main()
