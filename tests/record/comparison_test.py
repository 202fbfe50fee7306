"""Comparisons of runs, on folders that were written by hand."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.cli import side_by_side
from deepseek_jax.record import comparison, metrics, results
from deepseek_jax.record.report import bands, compared

_METRIC = 'heldout_bits_per_byte'


def _results(bits: float, **changes) -> dict:
  return {
    'heldout': {'bits_per_byte': bits},
    'tokens': 1000,
    'seconds': 3.0,
    'tokens_per_second': 333.0,
    'parameters': {'total': 5000, 'active': 4000},
    'flops': {'training': 1e9, 'per_token': 1e6},
    'peak_memory_bytes': 2**21,
    'data': {'heldout_sha256': 'a'},
  } | changes


def _run(
  folder: Path,
  name: str,
  bits: float | None,
  seed: int = 0,
  scoring: str = 'sigmoid',
  **changes,
) -> Path:
  path = folder / name
  path.mkdir(parents=True)
  config = {
    'model': {'moe': {'router': {'scoring': scoring}}, 'dim': 8},
    'data': {'seed': seed},
    'seed': seed,
    'keep': seed,  # changes no number: no arm differs by it
  }
  (path / 'config.json').write_text(json.dumps(config))
  with metrics.MetricsWriter(path, console=False) as writer:
    for step in range(1, 6):
      writer.write(step, {'loss': 5.0 / step + seed})
  if bits is not None:
    results.write(path, _results(bits, **changes))
  return path


class ComparisonTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def _sweep(self, ours=(2.0, 2.2, 2.1), theirs=(1.9, 2.05, 1.97)):
    for seed, (one, two) in enumerate(zip(ours, theirs)):
      _run(self.folder, f'a{seed}', one, seed)
      _run(self.folder, f'b{seed}', two, seed, 'softmax')
    found = comparison.folders([str(self.folder)])
    return comparison.arms([comparison.read(path) for path in found])

  def test_runs_are_grouped_by_all_but_their_seeds(self):
    arms = self._sweep()
    self.assertEqual(
      [arm.name for arm in arms],
      ['router.scoring=sigmoid', 'router.scoring=softmax'],
    )
    self.assertEqual([len(arm.runs) for arm in arms], [3, 3])

  def test_an_interval_is_students(self):
    # t(0.975, 2) = 4.302653 of any table.
    made = comparison.interval([1.0, 2.0, 4.0])
    self.assertAlmostEqual(made.mean, 7 / 3)
    spread = math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2)
    self.assertAlmostEqual(made.half, 4.302653 * spread / math.sqrt(3), 5)
    self.assertIsNone(comparison.interval([1.0]).half)

  def test_differences_are_paired_by_seed(self):
    (made,) = comparison.differences(self._sweep(), _METRIC)
    paired = comparison.interval([-0.1, -0.15, -0.13])
    np.testing.assert_allclose(made.interval[:2], paired[:2], rtol=1e-12)
    self.assertEqual(made.verdict, 'lower')
    # Unpaired, the seeds would drown it.
    unpaired = comparison.interval([2.0, 2.2, 2.1]).half
    self.assertGreater(unpaired, 3 * made.interval.half)

  def test_seeds_that_one_arm_lacks_are_no_pairs(self):
    arms = self._sweep()
    _run(self.folder, 'c', 9.0, seed=7)
    found = comparison.folders([str(self.folder)])
    more = comparison.arms([comparison.read(path) for path in found])
    self.assertEqual(
      comparison.differences(arms, _METRIC)[0].interval,
      comparison.differences(more, _METRIC)[0].interval,
    )

  @parameterized.parameters(
    ((2.0, 2.1), (2.1, 2.0), 'not told from 0'),
    ((2.0,), (1.0,), 'one seed: it may be noise'),
    ((1.0, 1.1), (2.0, 2.1001), 'higher'),
  )
  def test_says_what_a_difference_is_worth(self, ours, theirs, verdict):
    (made,) = comparison.differences(self._sweep(ours, theirs), _METRIC)
    self.assertEqual(made.verdict, verdict)

  def test_what_cannot_be_compared_is_named(self):
    _run(self.folder, 'a', 2.0)
    _run(
      self.folder, 'b', 1.0, scoring='softmax', tokens=2000,
      parameters={'total': 9000, 'active': 8000},
      data={'heldout_sha256': 'b'},
    )  # fmt: skip
    _run(self.folder, 'c', None, scoring='other')
    entries = map(comparison.read, comparison.folders([str(self.folder)]))
    lines = '\n'.join(comparison.cautions(comparison.arms([*entries])))
    for words in (
      'c: has not ended',
      'held-out tokens differ',
      'training tokens differ: 1,000 to 2,000',
      'active parameters differ by 100 %',
    ):
      self.assertIn(words, lines)

  def test_layers_that_no_planner_knows_have_no_flops(self):
    _run(self.folder, 'a', 2.0)
    _run(self.folder, 'b', 1.0, scoring='softmax', flops=None)
    entries = map(comparison.read, comparison.folders([str(self.folder)]))
    arms = comparison.arms([*entries])
    self.assertEqual(comparison.table(arms, _METRIC)[1]['FLOPs'], '—')
    self.assertEqual(comparison.cautions(arms), [])

  def test_two_runs_of_one_seed_are_refused(self):
    _run(self.folder, 'a', 2.0)
    _run(self.folder, 'b', 2.0)
    entries = map(comparison.read, comparison.folders([str(self.folder)]))
    with self.assertRaisesRegex(ds.InputError, 'same seeds; name one'):
      comparison.arms([*entries])

  def test_a_run_that_diverged_is_no_number_but_no_crash(self):
    _run(self.folder, 'a', 2.0)
    _run(self.folder, 'b', math.nan, scoring='softmax')
    entries = map(comparison.read, comparison.folders([str(self.folder)]))
    arms = comparison.arms([*entries])
    self.assertEqual(comparison.table(arms, _METRIC)[1][_METRIC], 'nan')
    (made,) = comparison.differences(arms, _METRIC)
    self.assertEqual(made.verdict, 'one seed: it may be noise')

  def test_a_diverged_seed_is_told(self):
    arms = self._sweep(theirs=(1.9, math.nan, 1.97))
    (made,) = comparison.differences(arms, _METRIC)
    self.assertEqual(made.verdict, 'a run diverged')
    self.assertEqual(comparison.table(arms, _METRIC)[1][_METRIC], 'nan')

  @parameterized.parameters('nowhere', '.')
  def test_a_folder_without_runs_is_named(self, name):
    with self.assertRaisesRegex(ds.InputError, 'is no folder|holds no run'):
      comparison.folders([str(self.folder / name)])

  def test_an_unknown_metric_names_those_there_are(self):
    entries = [comparison.read(_run(self.folder, 'a', 2.0))]
    with self.assertRaisesRegex(ds.InputError, 'no run has it; they have loss'):
      side_by_side.known_metric(entries, 'zzz')

  def test_the_page_holds_arms_curves_and_differences(self):
    self._sweep()
    out, numbers = self.folder / 'out.html', self.folder / 'out.json'
    side_by_side.compare(
      [str(self.folder)], _METRIC, out, 'A <b>', str(numbers)
    )
    page = out.read_text()
    for words in (
      'A &lt;b&gt;', 'router.scoring=softmax', '<svg', 'paired by seed',
      '<td>lower</td>', '95 % interval', 'Content-Security-Policy',
    ):  # fmt: skip
      self.assertIn(words, page)
    self.assertNotRegex(page, 'https?:')
    made = json.loads(numbers.read_text())
    self.assertEqual(made['differences']['router.scoring=softmax']['count'], 3)

  def test_a_band_has_the_steps_that_all_seeds_have(self):
    seeds = [
      (np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0])),
      (np.array([2, 3, 4]), np.array([4.0, 5.0, 6.0])),
    ]
    band = bands.of_seeds('x', seeds)
    np.testing.assert_array_equal(band.steps, [2, 3])
    np.testing.assert_array_equal(band.values, [[2, 3], [4, 5]])
    self.assertIsNone(bands.of_seeds('x', []))

  def test_a_long_band_is_averaged(self):
    values = np.arange(1000.0)[None] + [[0.0], [1.0]]
    band = bands.smoothed(bands.Band('x', np.arange(1000), values), 100)
    self.assertEqual(band.values.shape, (2, 100))
    np.testing.assert_allclose(band.values[0, 0], 4.5)
    np.testing.assert_allclose(band.values[1] - band.values[0], 1.0)

  def test_arms_without_a_common_metric_have_no_figure(self):
    path = self.folder / 'a'
    path.mkdir()
    (path / 'config.json').write_text('{}')
    arms = comparison.arms([comparison.read(path)])
    self.assertIsNone(compared.figure(arms, _METRIC))


class ResultsTest(absltest.TestCase):
  def test_versions_memory_and_git_are_known(self):
    versions = results.versions()
    self.assertEqual(versions['deepseek_jax'], ds.__version__)
    self.assertContainsSubset({'python', 'jax', 'numpy'}, versions)
    self.assertGreater(results.peak_memory(), 2**20)
    with tempfile.TemporaryDirectory() as folder:
      self.assertIsNone(results.git_state(Path(folder)))

  def test_what_is_written_is_read(self):
    with tempfile.TemporaryDirectory() as folder:
      self.assertIsNone(results.read(Path(folder)))
      results.write(Path(folder), {'heldout': None})
      self.assertEqual(results.read(Path(folder)), {'heldout': None})
      # A run that diverged has results, too.
      results.write(Path(folder), {'x': {'y': math.nan}, 'z': -math.inf})
      found = results.read(Path(folder))
      self.assertEqual(found, {'x': {'y': 'nan'}, 'z': '-inf'})
      with self.assertRaises(TypeError):
        results.write(Path(folder), {'x': object()})
      self.assertEqual(results.read(Path(folder)), found)


if __name__ == '__main__':
  absltest.main()
