"""Damaged checkpoints: found, named, and an older whole one used."""

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.cli import checkpoint as launcher
from deepseek_jax.errors import InputError
from deepseek_jax.run import integrity
from deepseek_jax.run.checkpoint import Checkpoints
from tests.faults import ledger

ROOT = Path(__file__).parents[2]


def _state(step: int) -> dict:
  draw = np.random.default_rng(step).normal
  return {'w': jnp.asarray(draw(size=(64, 64)), jnp.float32), 'n': jnp.int32(7)}


def flip(path: Path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def cut(path: Path):
  path.write_bytes(path.read_bytes()[:-1])


_DAMAGES = {'flip': flip, 'cut': cut, 'delete': Path.unlink}


class DamageTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.whole = Path(cls.enterClassContext(tempfile.TemporaryDirectory())) / 'c'
    with Checkpoints(cls.whole) as checkpoints:
      for step in (1, 2):
        checkpoints.save(step, _state(step), {'next': step}, {})

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = Path(folder) / 'checkpoints'
    shutil.copytree(self.whole, self.folder)

  def assert_restores(self, checkpoints, step):
    restored = checkpoints.restore(step, jax.eval_shape(lambda: _state(step)))
    for name, leaf in _state(step).items():
      np.testing.assert_array_equal(restored.state[name], leaf)
    self.assertEqual(restored.data, {'next': step})

  @parameterized.parameters(*_DAMAGES)
  def test_every_file_of_a_step(self, damage):
    """Whatever is done to whichever file, what is restored is what was saved.

    A file that the manifest lists, or the manifest, costs the step; the rest
    (marks of orbax that carry no data) costs nothing or the step.
    """
    names = [
      path.relative_to(self.folder / '2')
      for path in sorted((self.folder / '2').rglob('*'))
      if path.is_file() and path.stat().st_size
    ]
    self.assertGreater(len(names), 10)
    for name in names:
      shutil.rmtree(self.folder)
      shutil.copytree(self.whole, self.folder)
      _DAMAGES[damage](self.folder / '2' / name)
      said = []
      with (
        self.subTest(str(name)),
        ledger.fault(f'{damage} a file of a checkpoint'),
        Checkpoints(self.folder) as checkpoints,
      ):
        step = checkpoints.newest_whole(said.append)
        carries_data = name.name not in ('_CHECKPOINT_METADATA',)
        carries_data &= str(name) != 'commit_success.txt'
        if carries_data:
          self.assertEqual(step, 1)
          self.assertLen(said, 1)
          self.assertIn('checkpoint 2 is rejected', said[0])
          self.assertIn(str(name), said[0])
        self.assert_restores(checkpoints, step)

  def test_rejected_steps_make_way_for_the_same_numbers(self):
    flip(next((self.folder / '2').rglob('manifest.ocdbt')))
    before = self.folder.parent / 'checkpoints-rejected' / '2' / 'kept'
    before.mkdir(parents=True)  # set aside at an earlier start
    with Checkpoints(self.folder) as checkpoints:
      checkpoints.set_aside_after(checkpoints.newest_whole())
      self.assertEqual(checkpoints.steps(), [1])
      checkpoints.save(2, _state(2), {'next': 2}, {})
      checkpoints.wait()
      self.assertEqual(checkpoints.newest_whole(), 2)
      self.assert_restores(checkpoints, 2)
    self.assertTrue(before.is_dir())
    aside = self.folder.parent / 'checkpoints-rejected/2.1'
    self.assertTrue((aside / 'manifest.json').exists())

  def test_no_whole_step_is_a_refusal_that_names_the_files(self):
    for step in '12':
      cut(self.folder / step / 'data' / 'metadata')
    checkpoints = self.enter_context(Checkpoints(self.folder))
    with self.assertRaisesRegex(InputError, r'no checkpoint is whole') as e:
      checkpoints.newest_whole()
    for step in '12':
      self.assertIn(f'{step}/data/metadata has', str(e.exception))
    self.assertNotIn('\n', str(e.exception))

  def test_a_checkpoint_of_another_configuration_is_refused_by_name(self):
    checkpoints = self.enter_context(Checkpoints(self.folder))
    right = _state(2)
    wrong = {
      'w: float32[64, 64] is stored, expected float32[64, 65]': right
      | {'w': jnp.zeros((64, 65))},
      'w: float32[64, 64] is stored, expected bfloat16[64, 64]': right
      | {'w': jnp.zeros((64, 64), jnp.bfloat16)},
      'n: int32[] is stored, the model has none': {'w': right['w']},
      'v: missing, expected float32[3]': right | {'v': jnp.zeros(3)},
    }
    for line, like in wrong.items():
      with ledger.fault('checkpoint of another configuration'):
        with self.assertRaises(InputError) as caught:
          checkpoints.restore(2, like)
        self.assertIn(line, str(caught.exception))
        self.assert_restores(checkpoints, 2)

  def test_off_trusts_and_other_words_are_refused(self):
    with Checkpoints(self.folder, verify='off') as checkpoints:
      flip(self.folder / '2' / 'state' / '_sharding')
      self.assertEqual(checkpoints.newest_whole(), 2)
    with self.assertRaisesRegex(InputError, "verify = 'some': choose one of"):
      Checkpoints(self.folder, verify='some')

  def test_sample_hashes_small_files_and_some_of_the_larger(self):
    folder = self.folder.parent / 'files'
    folder.mkdir()
    for n in range(16):
      (folder / f'{n:02}').write_bytes(bytes(3 << 19))
    (folder / 'small').write_bytes(bytes(9))
    integrity.write_manifest(folder)
    self.assertIsNone(integrity.problem(folder, 'sample'))
    seen = []
    for path in sorted(folder.glob('[0-9s]*')):
      flip(path)
      self.assertIsNotNone(integrity.problem(folder, 'full'))
      seen += [path.name] * (integrity.problem(folder, 'sample') is not None)
      flip(path)
    self.assertEqual(seen, ['00', '08', 'small'])
    cut(folder / '03')
    self.assertIn('03 has', integrity.problem(folder, 'sample'))

  def test_a_save_is_committed_with_its_manifest(self):
    """The manifest is there before the step has its name."""
    seen = []
    original = integrity.write_manifest

    def watch(folder):
      seen.append((folder.name, (self.folder / '3').exists()))
      original(folder)

    integrity.write_manifest = watch
    self.addCleanup(setattr, integrity, 'write_manifest', original)
    with Checkpoints(self.folder) as checkpoints:
      checkpoints.save(3, _state(3), {}, {})
    self.assertEqual(seen, [('3.orbax-checkpoint-tmp', False)])

  def test_launcher_lists_verifies_and_prunes(self):
    keep = mock.patch.object(launcher, '_KEEP', mock.Mock(value=1))
    self.enter_context(keep)

    def call(*args):
      with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
          launcher.main(['checkpoint', *args])
        except SystemExit as end:
          return end.code, out.getvalue()
        except InputError as error:
          return error.status, str(error)

    run = str(self.folder.parent)
    self.assertEqual(call('verify', run)[0], 0)
    self.assertIn('manifest', call('ls', run)[1])
    flip(self.folder / '2' / 'data' / 'metadata')
    code, said = call('verify', run)
    self.assertEqual(code, 1)
    self.assertIn('data/metadata has another SHA-256', said)
    self.assertEqual(call('prune', run), (0, 'removed 2\n'))
    self.assertEqual([p.name for p in self.folder.iterdir()], ['1'])
    code, said = call('ls', run + '/nothing')
    self.assertEqual(code, 2)
    self.assertIn('holds no checkpoint', said)

  def test_the_launcher_is_a_program(self):
    done = subprocess.run(
      [sys.executable, '-m', 'experiments.checkpoint', 'mend', self.folder],
      capture_output=True,
      text=True,
      cwd=ROOT,
      check=False,
    )
    self.assertEqual(done.returncode, 2)
    self.assertRegex(
      done.stderr, r"^error: arguments \['mend', .*: give one of"
    )


if __name__ == '__main__':
  absltest.main()
