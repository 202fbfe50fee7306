"""A run, its results and extension, a sweep: real processes, a tiny model."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.record import metrics

_ROOT = Path(__file__).parents[2]
_TINY = [
  '--config=v3_tiny',
  '--config.model.vocab_size=261',
  '--config.model.dim=32',
  "--config.model.layout=((('moe',), 1),)",
  '--config.model.moe.width=16',
  '--config.model.mtp.depth=0',
  '--config.data.tokenizer=bytes',
  '--config.data.vocab_size=261',
  '--config.data.seq_len=64',
  '--config.data.heldout_fraction=0.3',
  '--config.train.tokens=768',
  '--config.train.batch.size=4',
  '--config.train.schedule.kind=constant',
  '--config.evaluate.every=0',
]


class LaboratoryTest(absltest.TestCase):
  """One run, made once; later tests go on with it."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    for name, body in (('code', 'def f{}(x):\n'), ('text', 'No {} words. ')):
      (cls.folder / name).mkdir()
      for i in range(10):
        text = ''.join(body.format(i * j) for j in range(60))
        (cls.folder / name / f'm{i}.txt').write_text(text)
    sources = {str(cls.folder / 'code'): 3.0, str(cls.folder / 'text'): 1.0}
    cls.config = [*_TINY, f'--config.data.sources={sources}']
    cls.run_folder = cls.folder / 'run'
    cls.trained = cls.run_it(
      'pretrain',
      *cls.config,
      f'--workdir={cls.run_folder}',
      '--profile=2:2',
      '--config.tensorboard=True',
    )

  @classmethod
  def run_it(cls, *args: str) -> subprocess.CompletedProcess:
    env = os.environ | {'XDG_CACHE_HOME': str(cls.folder / 'cache')}
    return subprocess.run(
      [sys.executable, '-m', 'deepseek_jax.cli.main', *args],
      cwd=cls.folder,
      env=env | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(_ROOT)},
      capture_output=True,
      text=True,
    )

  def results(self) -> dict:
    return json.loads((self.run_folder / 'results.json').read_text())

  def test_1_the_first_lines_say_what_the_run_is(self):
    self.assertEqual(self.trained.returncode, 0, msg=self.trained.stderr)
    for words in (
      'reading ', 'held out (', 'tokenizer: bytes, 261 tokens',
      'of them active', 'steps: 3 of 4 x 64 tokens', 'memory: ',
      'a device by the plan (', 'devices: ', 'compiling the step for 4',
      'unigram guess, bits per byte', 'zstd after the training text',
      'profile of steps 2 to 2',
    ):  # fmt: skip
      self.assertIn(words, self.trained.stdout)

  def test_2_results_hold_what_it_reached_and_with_what(self):
    found = self.results()
    held = found['heldout']
    rows = metrics.read(self.run_folder)
    self.assertEqual(rows[-1]['heldout_bits_per_byte'], held['bits_per_byte'])
    self.assertEqual((found['steps'], found['tokens']), (3, 768))
    self.assertGreater(
      found['parameters']['total'], found['parameters']['active']
    )
    self.assertGreater(found['flops']['training'], 0)
    self.assertGreater(found['seconds'], 0)
    self.assertGreater(found['peak_memory_bytes'], 2**20)
    self.assertLen(found['data']['heldout_sha256'], 64)
    self.assertEqual(found['seed'], 0)
    self.assertEqual(found['versions']['jax'], jax.__version__)
    self.assertTrue(found['machine'])
    self.assertIn('git', found)
    self.assertIn('git_of_working_folder', found)
    self.assertGreater(found['tokens_per_second'], 0)
    recorded = ds.read_routing(self.run_folder)
    self.assertEqual(recorded.arrays['load'].ndim, 3)
    base = held['baselines']
    # Eight bits a byte is more than a unigram guess, that more than xz primed.
    self.assertGreater(base['uniform'], base['unigram'])
    self.assertGreater(base['unigram'], base['xz'])
    self.assertGreater(base['xz'], base['xz primed'])
    shares = [rows[2][n] for n in ('share/code', 'share/text')]
    self.assertEqual(shares, [0.75, 0.25])
    traces = list((self.run_folder / 'profile').rglob('perfetto_trace*'))
    self.assertNotEmpty(traces)
    boards = list((self.run_folder / 'tensorboard').rglob('*tfevents*'))
    data = b''.join(path.read_bytes() for path in boards)
    for words in (b'heldout_bits_per_byte', b'model.dim', b'share/code'):
      self.assertIn(words, data)

  @pytest.mark.slow
  def test_3_a_longer_run_goes_on_where_its_schedule_allows_it(self):
    before = self.results()
    done = self.run_it(
      'resume', str(self.run_folder), '--tokens=1024', '--quiet'
    )
    self.assertEqual(done.returncode, 0, msg=done.stderr)
    # One step more is compiled and says nothing of the speed.
    after = self.results()
    self.assertEqual(after['tokens_per_second'], before['tokens_per_second'])
    self.assertGreaterEqual(
      after['peak_memory_bytes'], before['peak_memory_bytes']
    )
    self.assertEqual(
      (self.results()['steps'], self.results()['tokens']), (4, 1024)
    )
    self.assertLessEqual(len(done.stdout.splitlines()), 3, msg=done.stdout)
    shorter = self.run_it('resume', str(self.run_folder), '--tokens=512')
    self.assertEqual(shorter.returncode, 2)
    self.assertIn('1,024 tokens are trained already', shorter.stderr)
    # The command that began it is told how.
    again = self.run_it(
      'pretrain', *self.config, f'--workdir={self.run_folder}',
      '--config.train.schedule.kind=cosine',
    )  # fmt: skip
    self.assertEqual(again.returncode, 2)
    self.assertIn('holds another run', again.stderr)

  @pytest.mark.slow
  def test_4_a_sweep_runs_goes_on_and_compares(self):
    folder = self.folder / 'sweep'
    axis = ['--axis', 'model.moe.router.scoring=sigmoid,softmax']
    given = [*self.config, *axis, f'--folder={folder}']
    dry = self.run_it('sweep', *given, '--dry')
    self.assertLen(dry.stdout.splitlines(), 2, msg=dry.stderr)
    self.assertFalse(folder.exists())
    slurm = self.run_it('sweep', *given, '--slurm')
    self.assertIn('2 runs: sbatch', slurm.stdout, msg=slurm.stderr)
    text = (folder / 'sweep.sbatch').read_text()
    self.assertIn('--array=0-1', text)
    self.assertIn('77|79|134|137|143', text)
    one = self.run_it('sweep', f'--folder={folder}', '--only=0', '--quiet')
    self.assertEqual(one.returncode, 0, msg=one.stderr)
    done = self.run_it('sweep', f'--folder={folder}', '--quiet')
    self.assertEqual(done.returncode, 0, msg=done.stderr)
    self.assertIn('router.scoring=sigmoid-seed=0: has ended', done.stdout)
    page = (folder / 'compare.html').read_text()
    self.assertIn('router.scoring=softmax', page)
    self.assertIn('one seed: it may be noise', page)
    # A version that had a field less may have begun it.
    plan = json.loads((folder / 'sweep.json').read_text())
    for run in plan['runs']:
      del run['config']['model']['compute']['cache']
    (folder / 'sweep.json').write_text(json.dumps(plan))
    same = self.run_it('sweep', *given, '--dry')
    self.assertEqual(same.returncode, 0, msg=same.stderr)
    other = self.run_it('sweep', *given[:-1], f'--folder={folder}', '--seeds=2')
    self.assertEqual(other.returncode, 2)
    self.assertIn('holds another sweep', other.stderr)


if __name__ == '__main__':
  absltest.main()
