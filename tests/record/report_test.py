"""The report is one file, shows what was recorded, and trusts no text."""

import base64
import hashlib
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
from deepseek_jax.record.report import (
  curves,
  expert_figures,
  page,
  pixels,
  ticks,
)
from tests.record import fake_run

_HOSTILE = fake_run.HOSTILE
_PICTURE = r'<image [^>]*base64,([^"]*)"'


def _pixels(data):
  image = Image.open(io.BytesIO(base64.b64decode(data))).convert('RGBA')
  return np.asarray(image).astype(int)


def _viridis(share):
  return colormaps['viridis'](np.clip(share / 2, 0, 1), bytes=True).astype(int)


def _report(workdir):
  return fake_run.write_report(workdir).read_text('utf-8')


class _Page(html.parser.HTMLParser):
  """Elements, ids, addresses and text of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.pre = [], [], ''
    self.elements = []
    self._open = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.elements.append((tag, dict(attrs)))
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
    fake_run.write_run(cls.workdir, steps=70)
    cls.html = _report(cls.workdir)
    cls.page = _Page(cls.html)

  def test_the_page_loads_nothing(self):
    forbidden = {'link', 'iframe', 'object', 'embed', 'base', 'video', 'img'}
    self.assertEmpty(forbidden & set(self.page.tags))
    for address in self.page.named('src', 'href', 'xlink:href', 'srcset'):
      self.assertRegex(address, r'^(#|data:image/png;base64,)')
    self.assertNotIn('://', self.html)
    self.assertNotIn('@import', self.html)
    self.assertNotIn('url(', self.html)
    self.assertIn("default-src 'none'", self.html)

  def test_text_of_others_stays_text(self):
    scripts = [a for tag, a in self.page.elements if tag == 'script']
    code = [a for a in scripts if a.get('type') != 'application/json']
    self.assertEqual(code, [{}])
    self.assertEmpty([n for n, _ in self.page.attributes if n.startswith('on')])
    self.assertIn('Once ' + _HOSTILE + ' upon\n a ␀ ', self.page.pre)
    self.assertIn(r'\ud800 time', self.page.pre)
    self.assertIn(json.dumps(_HOSTILE), self.page.pre)

  def test_the_browser_is_told_to_run_the_pages_script_alone(self):
    [code] = re.findall(r'<script>(.*?)</script>', self.html, re.DOTALL)
    digest = hashlib.sha256(code.encode()).digest()
    want = f"script-src 'sha256-{base64.b64encode(digest).decode()}'"
    [policy] = [c for c in self.page.named('content') if 'src' in c]
    self.assertIn(want, policy)
    self.assertNotIn("script-src 'unsafe-inline'", policy)

  def test_ids_are_unique_and_references_resolve(self):
    ids = self.page.named('id')
    self.assertLen(ids, len(set(ids)))
    used = [a[1:] for a in self.page.named('href') if a.startswith('#')]
    used += self.page.named('aria-labelledby', 'for')
    self.assertNotEmpty(used)
    self.assertEmpty(set(used) - set(ids))

  def test_every_figure_is_well_formed(self):
    found = re.findall(r'<svg.*?</svg>', self.html, re.DOTALL)
    # Four scalars in two scales, of which one has a legend of two curves; the
    # load, and of three layers the load, the bias; three figures of balance.
    self.assertLen(found, 2 * (4 + 2) + 1 + 2 * 3 + 3)
    for svg in found:
      ElementTree.fromstring(svg)

  def test_every_chart_has_words_and_every_figure_a_caption(self):
    areas = [a for _, a in self.page.elements if a.get('class') == 'area']
    self.assertLen(areas, 2 * 4 + 1 + 2 * 3 + 3)
    for area in areas:
      self.assertEqual(area['role'], 'img')
      self.assertRegex(area['aria-label'], r'\d')
    figures = re.findall(r'<figure.*?</figure>', self.html, re.DOTALL)
    self.assertLen(figures, 8)
    for figure in figures:
      self.assertRegex(figure, r'</figcaption>\s*</figure>$')

  def test_the_contents_lead_to_every_section(self):
    [contents] = re.findall(r'<nav.*?</nav>', self.html, re.DOTALL)
    self.assertEqual(
      re.findall('href="#([^"]*)"', contents),
      re.findall('<section aria-labelledby="([^"]*)"', self.html),
    )

  def test_a_summary_holds_what_the_curve_does(self):
    self.assertIn(
      'Loss, nats per token. training: 5 to 0.07143 over steps 1 to 70, least'
      ' 0.07143, most 5; validation: 0.07857 to 0.07857 over steps 70 to 70',
      self.html,
    )

  def test_every_scalar_is_named(self):
    for title in ('Loss, nats', 'Gradient norm', 'Tokens per second'):
      self.assertIn(title, self.html)
    self.assertIn('validation</bdi> <b>0.07857</b>', self.html)
    self.assertIn('training</bdi> <b>0.07143</b>', self.html)

  def test_headline_numbers_are_short_and_exact(self):
    for text in ('1.235', '26.14 M', '26,141,184'):
      self.assertIn(f'{text}<', self.html)

  def test_idle_experts_are_counted(self):
    self.assertRegex(self.html, r'3 of 24\s+experts got no\s+token')

  def test_the_heatmap_shows_the_last_interval(self):
    load = flight.load(self.workdir / 'routing.npz').arrays['load'][-1]
    first = re.search(_PICTURE, self.html)[1]
    want = _viridis(8 * load / load.sum(-1, keepdims=True))
    # A step of 255 colours moves one by at most 3 of 255.
    np.testing.assert_allclose(_pixels(first), want, rtol=0, atol=3)

  def test_the_balance_of_each_layer_is_a_table(self):
    load = flight.load(self.workdir / 'routing.npz').arrays['load'][-1]
    for layer, row in enumerate(load / load.mean(-1, keepdims=True), 1):
      self.assertRegex(
        self.html,
        rf'<td>{layer}</td><td>{row.max() - 1:.3g}</td>'
        rf'<td>{row.max():.3g} \(expert {row.argmax()}\)</td>'
        r'<td>0 \(expert 0\)</td><td>1</td>',
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
    fake_run.write_run(self.workdir, steps=12, routing=False)
    page = _report(self.workdir)
    self.assertNotIn('id="experts"', page)
    self.assertLen(re.findall('<svg', page), 2 * (4 + 2))

  def test_a_run_of_one_step_gives_the_same_bytes_twice(self):
    fake_run.write_run(self.workdir, steps=1)
    page = _report(self.workdir)
    self.assertEqual(_report(self.workdir), page)
    self.assertIn('id="experts"', page)
    self.assertNotIn('log-x"', page)  # no logarithm of one step

  def test_a_dollar_in_a_name_is_no_formula(self):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(1, {'cost_$^$': 3.0})
    self.assertIn('>Cost $^$</bdi> <b>3<', _report(self.workdir))

  def test_a_scalar_of_validation_alone_says_so(self):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(1, {'loss': 3.0, 'validation_bits_per_byte': 2.0})
    self.assertIn(
      '>Validation bits per byte</bdi> <b>2<', _report(self.workdir)
    )

  def test_an_empty_run(self):
    text = page.write_report(self.workdir, title='x', facts={}).read_text()
    self.assertIn('recorded no scalars', text)
    self.assertNotIn('<svg', text)

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
    fake_run.write_scalars(self.workdir, 2000)
    fake_run.write_routing(self.workdir, 64, L=8, E=64)
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
    made = expert_figures.load_by_layer(share, [0, 1])
    want = _viridis(share)
    np.testing.assert_allclose(_pixels(made.picture), want, rtol=0, atol=3)
    self.assertEqual(made.size, (3, 2))
    self.assertEqual([t.label for t in made.up], ['0', '1'])
    self.assertEqual([t.place for t in made.up], [75, 25])  # downwards

  def test_what_is_no_number_is_transparent(self):
    lift = np.array([[[np.nan, 3], [0, np.nan]]])
    [made] = expert_figures.chosen_together(lift, [4], 4)
    alpha = _pixels(made.picture)[..., 3]
    np.testing.assert_array_equal(alpha, [[0, 255], [255, 0]])
    self.assertEqual([t.label for t in made.across], ['0', '2'])  # of four

  def test_many_lines_become_a_picture_and_few_stay_lines(self):
    for intervals, drawn in ((4, False), (400, True)):
      values = np.random.default_rng(0).normal(size=(intervals, 2, 64))
      steps = np.arange(intervals)
      made = expert_figures.lines_over_time(values, steps, [0, 1], 'bias')
      self.assertLen(made, 2)
      for chart in made:
        self.assertEqual(hasattr(chart, 'picture'), drawn)
        if not drawn:
          self.assertLen(chart.lines, 64)

  def test_a_drawn_line_is_where_its_values_are(self):
    heights = np.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.5]])
    drawn = pixels.lines(np.array([0, 0.5, 1]), heights, (21, 41))
    np.testing.assert_array_equal(drawn[10], np.full(41, 1))  # the later one
    self.assertEqual((drawn[20, 0], drawn[0, 20], drawn[20, 40]), (0, 0, 0))
    self.assertEqual(drawn[0, 0], pixels.NONE)
    # No column is left out on the way up.
    self.assertTrue((drawn == 0).any(axis=0).all())

  def test_a_path_goes_through_its_points(self):
    values = np.array([0.0, 4.0, 8.0])
    series = curves.Series('x', np.array([10, 20, 40]), values)
    [chart] = curves.charts([curves.Panel('x', '', [series])])
    points = re.findall(r'[\d.]+ [\d.]+', chart.lines[0].path)
    x, y = np.array([p.split() for p in points], float).T
    np.testing.assert_allclose(x, [0, 1000 / 3, 1000], atol=0.1)
    axis = chart.numbers['y']
    share = (values - axis['low']) / (axis['high'] - axis['low'])
    np.testing.assert_allclose(y, 1000 * (1 - share), atol=0.1)
    for tick in chart.up:  # a tick stands where its number is
      at = axis['low'] + tick.place / 100 * (axis['high'] - axis['low'])
      self.assertAlmostEqual(at, float(tick.label), places=3)

  def test_colors_of_ranks_are_told_from_either_paper(self):
    colors = pixels.ranks(255) / 255
    linear = np.where(
      colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4
    )
    light = linear @ [0.2126, 0.7152, 0.0722]
    dark_paper = 0.0092  # of #16181c
    self.assertGreater((1.05 / (light + 0.05)).min(), 3)
    self.assertGreater(((light + 0.05) / (dark_paper + 0.05)).min(), 3)

  @parameterized.parameters(
    ([0, 1],), ([0, 10, 20, 25],), ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9],)
  )
  def test_each_cell_shows_the_interval_under_it(self, edges):
    for cells in (1, 4, 7):
      picked = expert_figures.sample(np.array(edges), cells)
      self.assertLen(picked, cells)
      for n, interval in enumerate(picked):
        centre = edges[0] + (n + 0.5) * (edges[-1] - edges[0]) / cells
        self.assertBetween(centre, edges[interval], edges[interval + 1])

  @parameterized.parameters(False, True)
  def test_long_curves_keep_their_means_and_extremes(self, log_x):
    steps = np.arange(1, 5001)
    values = np.random.default_rng(0).normal(size=5000)
    x, mean, low, high = curves.binned(steps, values, log_x)
    self.assertLessEqual(len(x), curves.POINTS)
    self.assertEqual((low.min(), high.max()), (values.min(), values.max()))
    space = np.geomspace if log_x else np.linspace
    edges = space(1, 5000, curves.POINTS + 1)
    edges[-1] += 1
    inside = [
      values[(steps >= a) & (steps < b)] for a, b in itertools.pairwise(edges)
    ]
    want = [part.mean() for part in inside if len(part)]
    np.testing.assert_allclose(mean, want, rtol=1e-9)


class TicksTest(parameterized.TestCase):
  def _fits(self, axis, most, whole=False):
    found = ticks.ticks(axis, most, whole)
    self.assertBetween(len(found), 1, most)
    labels = [tick.label for tick in found]
    self.assertLen(set(labels), len(labels), labels)
    for tick in found:
      self.assertBetween(tick.place, -1e-3, 100.001)
      self.assertLess(len(tick.label), 12, labels)
    return labels

  def test_any_axis_has_ticks_that_differ(self):
    rng = np.random.default_rng(0)
    for _ in range(2000):
      low = rng.normal() * 10.0 ** rng.integers(-8, 9)
      span = 10.0 ** rng.integers(-3, 4) * max(abs(low), 1e-9)
      labels = self._fits(ticks.Axis(low, low + span), rng.integers(3, 9))
      self.assertGreater(len(labels), 1)
      first = rng.integers(0, 10 ** rng.integers(1, 8))
      last = first + rng.integers(1, 10 ** rng.integers(1, 8))
      self._fits(ticks.Axis(first, last), rng.integers(3, 9), whole=True)
      low = 10.0 ** rng.integers(-8, 9)
      span = 10.0 ** rng.uniform(0.1, 9)
      most = rng.integers(3, 9)
      self._fits(ticks.Axis(low, low * span, log=True), most)

  def test_ticks_of_a_logarithmic_axis_are_apart(self):
    for low, high in ((1, 3.7e6), (12_345, 3.7e6), (2.1, 5e4), (1, 20)):
      found = ticks.ticks(ticks.Axis(low, high, log=True), 5, whole=True)
      places = [tick.place for tick in found]
      self.assertGreater(len(places), 1)
      self.assertGreater(min(np.diff(places)), 20)

  @parameterized.parameters(
    ([0.0], 0),
    ([1e-30, 1e30], 0),
    ([1e-30, 1.0, 1.0, 1.0, 1e30], 1),
    ([3e38, -3e38], 0),
    ([5.0] * 9, 0),
    ([math.nan, math.inf], 0),
    ([1.0, 1.0 + 1e-15], 0),
    ([5e-324, 1e-323], 0),
    ([1.7e308, -1.7e308], 0),
  )
  def test_extreme_values_have_an_axis(self, values, log):
    axis = ticks.value_axis(np.array(values))
    self.assertLess(axis.low, axis.high)
    self.assertEqual(axis.log, bool(log))
    self._fits(axis, 5)
    inside = axis.place(np.array([v for v in values if math.isfinite(v)]))
    self.assertTrue(((inside >= 0) & (inside <= 1)).all(), inside)

  @parameterized.parameters(
    ([0, 0.0005, 0.001], ['0', '0.0005', '0.0010']),
    ([0, 1e-4, 2e-4], ['0', '1e-4', '2e-4']),
    ([12_345, 12_346], ['12.345k', '12.346k']),
    ([0, 500, 1000], ['0', '0.5k', '1.0k']),
    ([-2.5, 0, 2.5], ['-2.5', '0', '2.5']),
    ([2e9, 4e9], ['2e9', '4e9']),
  )
  def test_numbers_beside_ticks(self, numbers, want):
    self.assertEqual(ticks.labels(numbers), want)


if __name__ == '__main__':
  absltest.main()
