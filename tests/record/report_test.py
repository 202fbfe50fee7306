"""The report is one file, shows what was recorded, and trusts no text."""

import base64
import html.parser
import io
import itertools
import json
import math
import re
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from absl.testing import absltest, parameterized
from matplotlib import colormaps
from PIL import Image

from deepseek_jax.errors import InputError
from deepseek_jax.record import flight, metrics, routing
from deepseek_jax.record.metric import Metric, describe
from deepseek_jax.record.report import (
  curves as figures,
)
from deepseek_jax.record.report import (
  expert_figures as routing_figures,
)
from deepseek_jax.record.report import (
  page as report,
)

_HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(2)>$x_$&'


# A heatmap's image, scaled by positive factors: its first row is on top.
_MAP = r'<image [^>]*base64,\s*([^"]*)"[^>]*matrix\([\d.]+ 0 0 [\d.]+ '


def _pixels(data):
  image = Image.open(io.BytesIO(base64.b64decode(data)))
  return np.asarray(image).astype(int)


def _viridis(share):
  return colormaps['viridis'](np.clip(share / 2, 0, 1), bytes=True).astype(int)


def _write_scalars(workdir, steps):
  known = {
    'loss': Metric('Loss', 'nats per token'),
    'grad_norm': Metric('Gradient norm'),
  }
  describe(workdir, known)
  with metrics.MetricsWriter(workdir, console=False) as writer:
    for step in range(1, steps + 1):
      row = {'loss': 5 / step, 'grad_norm': 1.0 + step % 3, _HOSTILE: 1.0}
      writer.write(step, row, {'tokens_per_second': 1e4 + step})
    writer.write(steps, {'validation_loss': 5.5 / steps})


def _write_routing(workdir, steps, L=3, E=8):
  rng = np.random.default_rng(0)
  reduce = {'load': 'sum', 'bias': 'last', 'gate_entropy': 'mean'}
  recorder = routing.FlightRecorder(
    workdir / 'routing.npz', reduce, capacity=64, layers=range(1, L + 1)
  )
  for step in range(1, steps + 1):
    load = rng.integers(0, 100, (L, E))
    load[:, 0] = 0
    bias = rng.normal(size=(L, E)).astype(np.float32)
    recorder.record(step, load=load, bias=bias, gate_entropy=rng.random(L))
  recorder.save()


def _write_run(workdir, steps, routing=True):
  _write_scalars(workdir, steps)
  if routing:
    _write_routing(workdir, steps)
  lines = [('step', 6.0), ('compile', 3.0), ('step', 1.0)]
  rows = [json.dumps({'phase': p, 'seconds': s}) + '\n' for p, s in lines]
  (workdir / 'timeline.jsonl').write_text(''.join(rows))
  (workdir / 'config.json').write_text(json.dumps({'name': _HOSTILE}))


def _report(workdir):
  path = report.write_report(
    workdir,
    title='A run ' + _HOSTILE,
    facts={
      'bits per byte': 1.23456,
      'parameters': 26141184,
      _HOSTILE: _HOSTILE,
    },
    samples=[
      report.Sample('Once ' + _HOSTILE, ' upon\n a \x00 \ud800 time', _HOSTILE)
    ],
    notes=[_HOSTILE],
  )
  return path.read_text('utf-8')


class _Page(html.parser.HTMLParser):
  """Elements, ids, addresses and text of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.pre = [], [], ''
    self._open = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    self._open.append(tag)

  def handle_endtag(self, tag):
    while self._open and self._open.pop() != tag:
      pass

  def handle_data(self, data):
    if 'pre' in self._open:
      self.pre += data

  def named(self, *names):
    return [value for name, value in self.attributes if name in names]


class PageTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.workdir = Path(folder.name)
    _write_run(cls.workdir, steps=70)
    cls.html = _report(cls.workdir)
    cls.page = _Page(cls.html)

  def test_the_page_loads_nothing(self):
    forbidden = {'link', 'iframe', 'object', 'embed', 'base', 'video', 'img'}
    self.assertEmpty(forbidden & set(self.page.tags))
    for address in self.page.named('src', 'href', 'xlink:href', 'srcset'):
      self.assertRegex(address, r'^(#|data:image/png;base64,)')
    self.assertNotIn('://', self.html)
    self.assertNotIn('@import', self.html)
    for target in re.findall(r'url\((.)', self.html):
      self.assertEqual(target, '#')
    self.assertIn("default-src 'none'", self.html)

  def test_text_of_others_stays_text(self):
    self.assertEqual(self.page.tags.count('script'), 2)  # the data, the code
    self.assertEmpty([n for n, _ in self.page.attributes if n.startswith('on')])
    self.assertIn('Once ' + _HOSTILE + ' upon\n a ␀ ', self.page.pre)
    self.assertIn(r'\ud800 time', self.page.pre)
    self.assertIn(json.dumps(_HOSTILE), self.page.pre)

  def test_ids_are_unique_and_references_resolve(self):
    ids = self.page.named('id')
    self.assertLen(ids, len(set(ids)))
    used = re.findall(r'url\(#([^)]*)\)', self.html)
    used += [a[1:] for a in self.page.named('href') if a.startswith('#')]
    self.assertNotEmpty(used)
    self.assertEmpty(set(used) - set(ids))

  def test_every_figure_is_well_formed(self):
    found = re.findall(r'<svg.*?</svg>', self.html, re.DOTALL)
    # Two figures of curves, each in two scales; load, layers, balance, bias.
    self.assertLen(found, 8)
    for svg in found:
      ElementTree.fromstring(svg)

  def test_every_scalar_is_named(self):
    for title in ('Loss, nats', 'Gradient norm', 'Tokens per second'):
      self.assertIn(title, self.html)
    self.assertIn('validation 0.07857', self.html)
    self.assertIn('training 0.07143', self.html)

  def test_headline_numbers_are_short_and_exact(self):
    for text in ('1.235', '26.14 M', '26,141,184'):
      self.assertIn(f'{text}<', self.html)

  def test_idle_experts_are_counted(self):
    self.assertRegex(self.html, r'3 of 24\s+experts got no\s+token')

  def test_the_heatmap_shows_the_last_interval(self):
    load = flight.load(self.workdir / 'routing.npz').arrays['load'][-1]
    first = re.search(_MAP, self.html)[1]
    np.testing.assert_allclose(
      _pixels(first), _viridis(8 * load / load.sum(-1, keepdims=True)), atol=1
    )

  def test_phases_are_added_and_shared(self):
    row = r'step</td><td>7\.0</td><td>70\.0 %</td>'
    self.assertRegex(self.html, row)
    self.assertRegex(self.html, r'compile</td><td>3\.0</td><td>30\.0 %</td>')

  def test_the_inspector_holds_the_arrays(self):
    data = re.search(r'id="routing">(.*?)</script>', self.html)[1]
    run = json.loads(data)
    recorded = flight.load(self.workdir / 'routing.npz')
    self.assertEqual(run['layers'], [1, 2, 3])
    load, bias = run['arrays']
    mean = recorded.arrays['load'].mean(-1, keepdims=True)
    want = {
      'load': recorded.arrays['load'] / mean,
      'bias': recorded.arrays['bias'],
    }
    rows = np.searchsorted(recorded.last, run['last'])
    self.assertEqual(set(rows), set(range(len(recorded.last))))
    for array in (load, bias):
      codes = np.frombuffer(base64.b64decode(array['data']), '<u2')
      got = array['low'] + array['scale'] * codes.reshape(-1, 3, 8)
      exact = want[array['name']][rows]
      # Half a step of 16 bits.
      bound = 0.5001 * (exact.max() - exact.min()) / 65534
      self.assertLessEqual(np.abs(got - exact).max(), bound)


class RunsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = Path(folder.name)

  def test_pairs_are_drawn_and_inspected_in_units_of_chance(self):
    together = np.array([[[8, 4, 0], [4, 9, 3], [0, 3, 5]]])
    recorder = routing.FlightRecorder(
      self.workdir / 'routing.npz',
      {'load': 'sum', 'entropy': 'mean', 'moved': 'mean'},
      layers=[4],
      coarse={'together': 'sum'},
    )
    for step in (1, 2):
      recorder.record(
        step,
        load=np.array([[8, 9, 5]]),
        together=together * step,
        entropy=np.array([0.5]),
        moved=np.array([0.25]),
      )
    recorder.save()
    page = _report(self.workdir)
    run = json.loads(re.search(r'id="routing">(.*?)</script>', page)[1])
    pairs = run['together']
    codes = np.frombuffer(base64.b64decode(pairs['data']), '<u2')
    codes = codes.reshape(1, 3, 3)
    np.testing.assert_array_equal(np.diag(codes[0]), [65535] * 3)
    got = pairs['low'] + pairs['scale'] * codes[0]
    chosen = np.array([12.0, 16, 8])
    want = together[0] / (np.outer(chosen, chosen) / chosen.sum())
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(got[off], want[off], atol=1e-4)
    self.assertRegex(page, r'same token, over steps\s+2 to 2')
    for title in ('Entropy of the gate', 'Share of tokens moved by the bias'):
      self.assertIn(title, page)

  def test_a_dense_run_has_no_experts(self):
    _write_run(self.workdir, steps=12, routing=False)
    page = _report(self.workdir)
    self.assertNotIn('<h2>Experts', page)
    self.assertLen(re.findall('<svg', page), 4)

  def test_a_run_of_one_step_gives_the_same_bytes_twice(self):
    _write_run(self.workdir, steps=1)
    page = _report(self.workdir)
    self.assertEqual(_report(self.workdir), page)
    self.assertIn('<h2>Experts', page)
    self.assertLen(re.findall('<svg', page), 6)  # no logarithm of one step

  def test_a_dollar_in_a_name_is_no_formula(self):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(1, {'cost_$^$': 3.0})
    self.assertIn('>Cost $^$<', _report(self.workdir))

  def test_a_scalar_of_validation_alone_says_so(self):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(1, {'loss': 3.0, 'validation_bits_per_byte': 2.0})
    self.assertIn('>Validation bits per byte<', _report(self.workdir))

  def test_an_empty_run(self):
    page = report.write_report(self.workdir, title='x', facts={}).read_text()
    self.assertIn('recorded no scalars', page)
    self.assertNotIn('<svg', page)

  def test_values_that_are_not_finite_are_told(self):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      for step, loss in enumerate([3.0, math.nan, 2.0, math.inf, math.nan]):
        writer.write(step, {'loss': loss, 'all_nan': math.nan})
    page = _report(self.workdir)
    self.assertRegex(
      page, r'<code>loss</code> was not finite 3\s+times, first at step 1'
    )
    self.assertRegex(page, r'<code>all_nan</code> was not finite 5')

  def test_a_recording_without_load_or_tokens(self):
    recorder = routing.FlightRecorder(
      self.workdir / 'routing.npz', {'load': 'sum', 'lost': 'sum'}
    )
    recorder.record(1, load=np.zeros((2, 4), int), lost=np.ones(2))
    recorder.save()
    self.assertRegex(_report(self.workdir), r'8 of 8\s+experts got no')

  def test_a_large_run_stays_small(self):
    _write_scalars(self.workdir, 2000)
    _write_routing(self.workdir, 64, L=8, E=64)
    self.assertLess(len(_report(self.workdir)), 3e6)

  @parameterized.parameters(
    ('timeline.jsonl', '{"phase": "step"}\n', r'timeline\.jsonl, line 1'),
    ('config.json', '{', r'config\.json is not JSON'),
    ('metrics.jsonl', 'x\n', r'metrics\.jsonl, line 1'),
  )
  def test_a_broken_file_is_named(self, name, text, message):
    (self.workdir / name).write_text(text)
    with self.assertRaisesRegex(InputError, message):
      _report(self.workdir)


class FiguresTest(parameterized.TestCase):
  def test_heatmap_pixels_are_the_loads(self):
    share = np.array([[0, 0.5, 1], [1.5, 2, 9]])
    svg = routing_figures.load_by_layer(share, [0, 1])
    [data] = re.findall(_MAP, svg)
    # 1 of 255: a bright load is the map's last colour or the one above it.
    np.testing.assert_allclose(_pixels(data), _viridis(share), rtol=0, atol=1)

  def test_many_lines_become_pixels_and_few_stay_lines(self):
    for intervals, pixels in ((4, 0), (400, 2)):
      values = np.random.default_rng(0).normal(size=(intervals, 2, 64))
      steps = np.arange(intervals)
      [svg] = routing_figures.lines_over_time(values, steps, [0, 1], 'bias')
      self.assertEqual(svg.count('<image'), pixels)

  @parameterized.parameters(
    ([0, 1],), ([0, 10, 20, 25],), ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9],)
  )
  def test_each_cell_shows_the_interval_under_it(self, edges):
    for cells in (1, 4, 7):
      picked = routing_figures.sample(np.array(edges), cells)
      self.assertLen(picked, cells)
      for n, interval in enumerate(picked):
        centre = edges[0] + (n + 0.5) * (edges[-1] - edges[0]) / cells
        self.assertBetween(centre, edges[interval], edges[interval + 1])

  @parameterized.parameters(False, True)
  def test_long_curves_keep_their_means_and_extremes(self, log_x):
    steps = np.arange(1, 5001)
    values = np.random.default_rng(0).normal(size=5000)
    x, mean, low, high = figures._binned(steps, values, log_x)
    self.assertLessEqual(len(x), figures.POINTS)
    self.assertEqual((low.min(), high.max()), (values.min(), values.max()))
    space = np.geomspace if log_x else np.linspace
    edges = space(1, 5000, figures.POINTS + 1)
    edges[-1] += 1
    inside = [
      values[(steps >= a) & (steps < b)] for a, b in itertools.pairwise(edges)
    ]
    want = [part.mean() for part in inside if len(part)]
    np.testing.assert_allclose(mean, want, rtol=1e-9)


if __name__ == '__main__':
  absltest.main()
