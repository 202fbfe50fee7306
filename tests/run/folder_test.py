"""What a run's folder holds is bound to the run: steps, values, tokenizer."""

import functools
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax import say
from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.errors import InputError, RunAborted
from deepseek_jax.run import fit as loop
from deepseek_jax.run import folder, replay, soundness
from deepseek_jax.run.checkpoint import Checkpoints
from tests.faults import runs


class FolderTest(runs.RunTest):
  """Copies of a run of 8 steps."""

  def setUp(self):
    super().setUp()
    runs.straight()
    self.run_folder = self.folder / 'run'
    shutil.copytree(runs.home() / 'straight', self.run_folder)
    self.saved = self.run_folder / 'checkpoints'

  def again(self, **changes) -> list[str]:
    """What a further start says on stderr."""
    with mock.patch.object(say, 'warn') as warned:
      self.fit('run', **changes)
    return [call.args[0] for call in warned.call_args_list]

  def saved_anew(self, step: int, change=lambda s: s, **data) -> None:
    """Writes a checkpoint again, after a change of state or data."""
    config = folder.config_of(self.run_folder)
    fresh = functools.partial(loop.fresh_state, config, ds.build(config.model))
    with Checkpoints(self.saved) as checkpoints:
      old = checkpoints.restore(step, jax.eval_shape(fresh))
    for other in self.saved.iterdir():  # no later one, or nothing is saved
      shutil.rmtree(other)
    data = {n: v for n, v in (old.data | data).items() if v is not None}
    with Checkpoints(self.saved, keep=9) as checkpoints:
      checkpoints.save(step, change(old.state), data, old.config, wait=True)

  def test_a_step_under_another_name_is_refused_by_name(self):
    (self.saved / '8').rename(self.saved / '99')
    words = r'checkpoints/99 holds the state of step 8: give the folder'
    for use in (
      self.again,
      lambda: loop.load(self.run_folder),
    ):
      with self.assertRaisesRegex(InputError, words):
        use()
    (self.saved / '99').rename(self.saved / '8')
    (self.saved / '6').rename(self.saved / '7')
    with self.assertRaisesRegex(InputError, r'/7 holds the state of step 6'):
      next(replay.replay(self.run_folder, 8))

  def test_a_step_that_is_saved_with_other_values_is_refused(self):
    path = self.run_folder / 'config.json'
    config = json.loads(path.read_text())
    config['train']['schedule']['peak'] = 0.5
    config['keep'] = 3  # which may differ
    path.write_text(json.dumps(config))
    words = (
      r'/8 was saved with another configuration \(train.schedule.peak: 0.003'
      r' there, 0.5 here\): put'
    )
    with self.assertRaisesRegex(InputError, words):
      self.again(**{'train.schedule.peak': 0.5, 'keep': 3})
    with self.assertRaisesRegex(InputError, words):
      loop.load(self.run_folder)
    with self.assertRaisesRegex(InputError, '/6 was saved with another'):
      next(replay.replay(self.run_folder, 8))

  def other_tokenizer(self) -> None:
    for file in self.run_folder.glob('tokenizer*'):
      file.unlink()
    texts = ['def f(x):\n  return x\n'] * 9
    train_bpe(texts, 270).save(str(self.run_folder))

  def test_the_tokenizer_of_another_run_is_refused_and_set_aside(self):
    self.other_tokenizer()
    path = self.run_folder / 'tokenizer.json'
    other = path.read_bytes()
    with self.assertRaisesRegex(InputError, 'json is not the tokenizer that'):
      loop.load(self.run_folder)
    (said,) = self.again()
    self.assertIn('is not of this run: it is now tokenizer.json.damaged', said)
    aside = self.run_folder / 'tokenizer.json.damaged-1'
    self.assertEqual(aside.read_bytes(), other)
    self.assertEqual(loop.load(self.run_folder).tokenizer.kind, 'bytes')
    self.assertEqual(self.again(), [])

  def test_a_run_that_says_no_hash_loads(self):
    self.saved_anew(8, tokenizer_sha256=None)
    self.assertEqual(loop.load(self.run_folder).step, 8)
    self.assertEqual(self.again(), [])

  def test_the_right_file_serves_a_run_whose_data_have_another(self):
    own = datalib.from_file(str(self.run_folder))
    other = mock.Mock(sha256='0' * 64)
    folder.keep_tokenizer(self.run_folder, other, own.sha256)
    other.save.assert_not_called()
    self.other_tokenizer()
    with self.assertRaisesRegex(InputError, 'data.tokenizer: is not the one'):
      folder.keep_tokenizer(self.run_folder, other, own.sha256)

  def test_moments_that_are_not_finite_are_named_with_a_way_out(self):
    def spoilt(state):
      return state._replace(
        moments=jax.tree.map(
          lambda m: m.at[0].set(np.nan) if m.ndim == 2 else m, state.moments
        )
      )

    self.saved_anew(6, spoilt)
    changes = {'train.gate.patience': 2}
    lines = []
    with (
      mock.patch.object(say, 'warn', lines.append),
      self.assertRaises(RunAborted) as caught,
    ):
      self.fit('run', **changes)
    (line,) = lines
    for said in (line, str(caught.exception)):
      self.assertRegex(said, r'moments [^;]*embed')
      self.assertIn(f'--config.init_from={self.run_folder}', said)
      self.assertNotIn('\n', said)
    self.assertIn('/6 is not finite in moments', line)
    self.assertIn('updates of embed', str(caught.exception))
    self.assertIn('the same command ends here again', str(caught.exception))
    # The way out is one.
    run = self.fit('anew', init_from=str(self.run_folder))
    self.assertEqual(int(run.state.gate.skipped), 0)


class SoundnessTest(absltest.TestCase):
  def test_on_devices_and_on_the_host(self):
    bad = np.array([1, np.inf], np.float32)
    tree = {'a': {0: bad, 1: bad[:1]}, 'n': np.int32(3), 'h': bad.astype('f2')}
    self.assertEqual(soundness.not_finite(tree), ['a.0', 'h'])
    arrays = jax.tree.map(jnp.asarray, tree)
    self.assertEqual(soundness.not_finite(arrays), ['a.0', 'h'])
    self.assertEqual(soundness.not_finite({}), [])

  def test_what_is_to_do_about_bad_batches(self):
    norms = {'embed': np.float32(1), 'segments.0.0': np.array([1, np.nan])}
    fine = {'embed': np.float32(1)}
    state = mock.Mock(params={'embed': np.ones(2)}, moments={})
    told = lambda grads, updates: soundness.of_refused(
      {'block_norms': grads, 'update_norms': updates}, state, 'runs/mine'
    )
    self.assertRegex(
      told(norms, norms),
      r'not finite are gradients of segments.0.0; updates of segments.0.0;'
      r' .*gate.patience .*replay --workdir=runs/mine',
    )
    self.assertRegex(told(fine, fine), 'all numbers are finite; .*patience')
    self.assertRegex(told(fine, norms), r'updates of segm.*init_from=runs/mine')


if __name__ == '__main__':
  absltest.main()
