"""An experiment file outside the repository defines an attention and a router.

One run of two tiny steps, by the launchers, and what they say afterwards.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

import deepseek_jax as ds

_ROOT = Path(__file__).parents[2]
_FILE = Path(__file__).with_name('own_window.py')


def _start(home: Path, verb: str, *args: str) -> subprocess.Popen:
  env = os.environ | {
    'XDG_CACHE_HOME': str(home / 'cache'),
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(_ROOT),
  }
  return subprocess.Popen(
    [sys.executable, '-m', f'experiments.{verb}', *args],
    cwd=home,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _digest(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


class OwnCodeTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    holder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(holder.cleanup)
    cls.home = home = Path(holder.name)
    text = home / 'text'
    text.mkdir()
    for i in range(4):
      body = ''.join(f'def f{j}(x):\n  return x + {i}\n\n' for j in range(30))
      (text / f'm{i}.py').write_text(body)
    for folder in ('first', 'changed', 'other'):
      (home / folder).mkdir()
    cls.file = Path(shutil.copy(_FILE, home / 'first' / 'mine.py'))
    cls.changed = home / 'changed' / 'mine.py'
    cls.changed.write_text(cls.file.read_text() + '# Another file.\n')
    cls.other = home / 'other' / 'unrelated.py'
    cls.other.write_text('def get_config():\n  raise ValueError\n')
    cls.flags = (
      f'--config.data.path={text}',
      '--config.model.attention.window=2',
      '--workdir=run',
    )
    trained = _start(home, 'pretrain', f'--config={cls.file}', *cls.flags)
    cls.out, cls.err = trained.communicate(timeout=500)
    cls.status = trained.returncode

  def said(self, verb: str, *args: str) -> str:
    """Launchers refuse in one line."""
    started = _start(self.home, verb, *args)
    out, err = started.communicate(timeout=300)
    self.assertEqual(started.returncode, 2, out + err)
    lines = err.strip().splitlines()
    self.assertLen(lines, 1, err)
    return lines[0]

  def test_trains_and_stores_the_class_and_the_hash(self):
    self.assertEqual(self.status, 0, self.err)
    rows = ds.read_metrics(self.home / 'run')
    self.assertEqual([r['step'] for r in rows if 'loss' in r], [1, 2])
    config = json.loads((self.home / 'run' / 'config.json').read_text())
    self.assertEqual(config['model']['attention']['kind'], 'mine:WindowConfig')
    self.assertEqual(config['model']['attention']['window'], 2)
    self.assertEqual(config['model']['moe']['router']['floor'], 0.1)
    entry = {'file': 'mine.py', 'sha256': _digest(self.file)}
    self.assertEqual(config['code'], {'mine': entry})

  def test_samples_with_the_file(self):
    args = ['--workdir=run', '--prompt=def f', f'--config={self.file}']
    started = _start(self.home, 'sample', *args, '--max_new_tokens=3')
    out, err = started.communicate(timeout=300)
    self.assertEqual(started.returncode, 0, err)
    self.assertStartsWith(out, 'def f')

  def test_replays_with_the_file(self):
    args = ['--workdir=run', '--step=2', f'--config={self.file}']
    started = _start(self.home, 'replay', *args)
    out, err = started.communicate(timeout=300)
    self.assertEqual(started.returncode, 0, out + err)
    self.assertIn('same', out)

  @parameterized.parameters(
    ('sample', '--workdir=run', '--prompt=x'),
    ('replay', '--workdir=run', '--step=1'),
    ('convert', '--from=run', '--to=out'),
  )
  def test_the_file_is_needed(self, verb, *args):
    line = self.said(verb, *args)
    for word in ('mine:WindowConfig', 'give --config=FILE', '(mine.py)'):
      self.assertIn(word, line)

  @parameterized.parameters('changed', 'other')
  def test_another_file_is_refused(self, which):
    file = getattr(self, which)
    line = self.said(
      'sample', '--workdir=run', '--prompt=x', f'--config={file}'
    )
    self.assertIn('mine.py', line)
    if which == 'changed':
      self.assertIn(_digest(self.file), line)
      self.assertIn(_digest(self.changed), line)

  def test_a_run_goes_on_with_the_same_file_alone(self):
    before = (self.home / 'run' / 'config.json').read_bytes()
    line = self.said('pretrain', f'--config={self.changed}', *self.flags)
    for word in (_digest(self.file), _digest(self.changed), 'init_from=run'):
      self.assertIn(word, line)
    self.assertEqual((self.home / 'run' / 'config.json').read_bytes(), before)

  def test_is_in_no_hugging_face_family(self):
    args = ['--from=run', '--to=out', f'--config={self.file}']
    line = self.said('convert', *args)
    self.assertIn('attention = mine:WindowConfig: no Hugging Face', line)

  @parameterized.parameters(
    ('--config=v3_tiny', '--config=v3_tiny: no such file'),
    ('--config.model.attention.window=3', 'config.model.attention.window'),
  )
  def test_sample_takes_a_file_and_no_field(self, flag, words):
    line = self.said('sample', '--workdir=run', '--prompt=x', flag)
    self.assertIn(words, line)

  @parameterized.parameters(
    ('attention.windw=3', 'did you mean --config.model.attention.window?'),
    ('attention.window=0', 'model.attention: window = 0: must be at least 1'),
    ('attention.kind=os:getcwd', 'no such dataclass is imported'),
  )
  def test_flags_of_own_fields_are_checked(self, flag, words):
    given = f'--config={self.file}', *self.flags, f'--config.model.{flag}'
    self.assertIn(words, self.said('pretrain', *given))


if __name__ == '__main__':
  absltest.main()
