"""The ladder's launcher: runs, goes on, reports, and refuses bad input."""

import contextlib
import dataclasses
import importlib
import io
import json
import pathlib
import sys
import tempfile

import pytest
from absl import flags
from absl.testing import absltest, flagsaver, parameterized

import deepseek_jax as ds
from deepseek_jax.cli import ladder
from deepseek_jax.ladder import measured
from deepseek_jax.ladder.sizes import SIZES

_SMOKE = SIZES['smoke']
_ARM = """import deepseek_jax as ds

def get_config(size='half_hour'):
  run = ds.ladder.config('gqa', 'half_hour')
  return ds.changed(run, {{
    'model.dim': 16, 'model.vocab_size': 261, 'model.ffn.width': {width},
    'model.layout': ((('dense',), 1),), 'data.path': {path!r},
    'data.tokenizer': 'bytes', 'data.vocab_size': 261, 'data.seq_len': 16,
    'evaluate.stride': 16, 'train.batch.size': 2, 'train.schedule.warmup': 1,
    'data.heldout_fraction': 0.3, 'data.cache_dir': {cache!r},
  }})
"""


class LadderTest(parameterized.TestCase):
  """Two rungs of one layer."""

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    text, self.arms = self.folder / 'text', self.folder / 'arms'
    text.mkdir()
    self.arms.mkdir()
    for i in range(10):
      words = ' '.join(f'word {i * j} of {i}' for j in range(60))
      (text / f'{i}.txt').write_text(words)
    cache = str(self.folder / 'cache')
    for name, width in (('0_gqa', 16), ('1_wide', 48)):
      code = _ARM.format(width=width, path=str(text), cache=cache)
      (self.arms / f'{name}.py').write_text(code)
    # Its flags must be known before: what a flagsaver sees come goes with it.
    importlib.import_module('grain')
    if not flags.FLAGS.is_parsed():
      flags.FLAGS([sys.argv[0]])
    # Eleven steps of the narrow one, ten of the wide one.
    tiny = dataclasses.replace(_SMOKE, budgets=(2.8e7, 8.4e7))
    self.enter_context(absltest.mock.patch.dict(SIZES, {'smoke': tiny}))

  def climb(self, **changes):
    """Returns what a call of the launcher prints."""
    given = {
      'size': 'smoke',
      'folder': str(self.folder / 'runs'),
      'arms': str(self.arms),
    } | changes
    out = io.StringIO()
    with flagsaver.flagsaver(**given), contextlib.redirect_stdout(out):
      ladder.main(['ladder'])
    return out.getvalue()

  def test_runs_once_goes_on_and_reports(self):
    told = self.climb(rungs=['wide'])
    self.assertRegex(told, r'1 rungs, 2 runs, .* FLOPs: about')
    self.assertIn('not complete yet: gqa; without --rungs', told)
    runs = self.folder / 'runs'
    self.assertFalse((runs / 'ladder.json').exists())
    done = {
      path: path.stat().st_mtime_ns for path in runs.rglob('results.json')
    }
    self.assertLen(done, 2)
    told = self.climb()
    for path, then in done.items():
      self.assertEqual(path.stat().st_mtime_ns, then, path)
    self.assertNotIn('wide-rate', told)
    self.assertIn('budget 2 2/2 gqa-rate=0.004-seed=1: ', told)
    found = json.loads((runs / 'ladder.json').read_text())
    self.assertEqual(list(found['rungs']), ['gqa', 'wide'])
    self.assertLen(found['points'], 6)
    self.assertEqual(found['runs'], 4)
    self.assertNotIn('published', found)
    self.assertIn('| gqa → wide |', (runs / 'ladder.md').read_text())
    self.assertTrue((runs / 'ladder.png').exists())
    rows = ds.read_metrics(runs / 'gqa-rate=0.004-seed=0')
    # It stopped after the smallest budget, and went on.
    self.assertLen([row for row in rows if measured.VALIDATED in row], 2)
    steps = [row['step'] for row in rows if 'loss' in row]
    self.assertEqual(steps, list(range(1, steps[-1] + 1)))
    # A version that had a field less may have begun it.
    plan = json.loads((runs / ladder.FILE).read_text())
    for arm in plan['arms'].values():
      del arm['model']['compute']['cache']
    (runs / ladder.FILE).write_text(json.dumps(plan))
    self.climb()
    # Another ladder may not go on in its folder.
    arm = self.arms / '1_wide.py'
    arm.write_text(arm.read_text().replace('48', '32'))
    with self.assertRaisesRegex(ds.InputError, 'holds another ladder'):
      self.climb()

  def test_a_run_that_gives_up_is_left_out_and_not_started_again(self):
    runs = self.folder / 'runs'
    real = ladder.loop.fit

    def fit(config, workdir, **given):
      if 'rate=0.004' in str(workdir):
        workdir.mkdir(parents=True)
        raise ds.RunAborted('20 updates in a row were not finite')
      return real(config, workdir, **given)

    two = dataclasses.replace(SIZES['smoke'], rates=(2e-3, 4e-3))
    with (
      absltest.mock.patch.dict(SIZES, {'smoke': two}),
      absltest.mock.patch.object(ladder.loop, 'fit', fit),
    ):
      told = self.climb(rungs=['gqa'])
      self.assertIn('gave up (20 updates', told)
      self.assertLen(list(runs.rglob(measured.GAVE_UP)), 1)
      self.assertIn('budget 2 1/2 gqa-rate=0.002', told)
      again = self.climb(rungs=['gqa'])
      self.assertNotIn('gave up', again)

  def test_says_what_would_run_and_writes_nothing(self):
    told = self.climb(dry=True)
    self.assertRegex(told, r'2 rungs, 4 runs, .* FLOPs: about')
    self.assertIn('hours on two quiet CPU cores', told)
    self.assertFalse((self.folder / 'runs').exists())

  @parameterized.parameters(
    ({'folder': None}, 'give --folder=FOLDER'),
    ({'rungs': ['mlp']}, '--rungs=mlp: must be one of gqa, wide'),
    ({'first': 'mla'}, '--first=mla: must be one of gqa, wide'),
    ({'arms': '/absent'}, '--arms=/absent: is no folder'),
  )
  def test_a_wrong_flag_is_named(self, changes, words):
    with self.assertRaisesRegex(ds.InputError, words):
      self.climb(**changes)
    self.assertFalse((self.folder / 'runs').exists())

  @parameterized.parameters(
    ('2_gqa.py', 'def get_config(size): pass', 'names no other rung'),
    ('2_.py', 'def get_config(size): pass', 'names no other rung'),
    ('2_new.py', 'def get_config(size): pass', 'returns NoneType'),
    ('2_new.py', 'def get_config(size): 1 / 0', 'ZeroDivisionError'),
    ('2_new.py', 'x = ', 'SyntaxError'),
    ('2_new.py', 'x = 1', 'AttributeError'),
  )
  def test_a_wrong_arm_is_named(self, name, code, words):
    (self.arms / name).write_text(code)
    with self.assertRaisesRegex(ds.InputError, f'--arms: .*{name}.*{words}'):
      self.climb()

  def test_a_folder_without_arms_is_named(self):
    for path in self.arms.glob('*.py'):
      path.unlink()
    with self.assertRaisesRegex(ds.InputError, 'holds no experiment file'):
      self.climb()

  def test_nothing_measured_is_no_report(self):
    with self.assertRaisesRegex(ds.InputError, "'gqa', .* has not yet stopped"):
      self.climb(report=True)

  @pytest.mark.slow
  def test_every_rung_climbs(self):
    with absltest.mock.patch.dict(SIZES, {'smoke': _SMOKE}):
      told = self.climb(arms=None)
    self.assertIn('results: ', told)
    found = json.loads((self.folder / 'runs' / 'ladder.json').read_text())
    self.assertLen(found['rungs'], 14)


if __name__ == '__main__':
  absltest.main()
