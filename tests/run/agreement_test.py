"""What the other processes have is compared, with process 0 played."""

import json
import types
from unittest import mock

import jax
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import agreement, folder
from deepseek_jax.run.checkpoint import Restored
from tests.faults import runs


class AgreementTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.config = runs.config(runs.home())
    self.kept = []
    self.play(first=True)

  def play(self, *, first: bool) -> None:
    """Keeps what process 0 passes, or gives it to process 3."""

    def text_from_first(text: str) -> str:
      if first:
        self.kept.append(text)
        return text
      return self.kept.pop(0)

    patched = mock.patch.multiple(
      distributed,
      text_from_first=text_from_first,
      wait_for_all=lambda: None,
    )
    self.enter_context(patched)
    number = 0 if first else 3
    index = mock.patch.object(jax, 'process_index', return_value=number)
    self.enter_context(index)

  @parameterized.parameters(
    ('evaluate.every', 4, 'evaluate.every: 0 in process 0, 4 in process 3'),
    ('checkpoint_every', 5, 'checkpoint_every: 3 in process 0, 5 in'),
    ('mesh.fsdp', 4, 'mesh.fsdp: 1 in process 0, 4 in'),
    ('safety.hang_factor', 9.0, 'safety.hang_factor: 30.0 in process 0, 9.0'),
    ('data.cache_dir', 'x', 'data.cache_dir: '),
    ('evaluate.stride', 8, 'evaluate.stride: null in process 0, 8 in process'),
  )
  def test_every_field_is_compared(self, field, value, words):
    agreement.check_config(self.config)
    self.play(first=False)
    other = ds.changed(self.config, {field: value})
    with self.assertRaisesRegex(InputError, words):
      agreement.check_config(other)

  def test_the_same_is_the_same(self):
    for _ in range(2):
      agreement.check_config(self.config)
    agreement.check_data(self.config, self.store())
    self.play(first=False)
    for _ in range(2):
      agreement.check_config(self.config)
    agreement.check_data(self.config, self.store())

  def test_another_jax_is_named(self):
    agreement.check_config(self.config)
    self.play(first=False)
    with (
      mock.patch.object(jax, '__version__', '0.0.1'),
      self.assertRaisesRegex(InputError, 'version: .* "0.0.1" in process 3'),
    ):
      agreement.check_config(self.config)

  def store(self, **changes):
    own = {'train': 'a', 'heldout': 'b', 'tokenizer': 'c'} | changes
    return types.SimpleNamespace(
      train_sha256=own['train'],
      heldout_sha256=own['heldout'],
      index={'tokenizer': {'sha256': own['tokenizer']}},
    )

  @parameterized.parameters(
    ('train', 'training text: "a" in process 0, "x" in process 3'),
    ('heldout', 'held-out text: "b"'),
    ('tokenizer', 'tokenizer: "c"'),
  )
  def test_text_and_tokenizer_are_compared(self, what, words):
    config = ds.changed(self.config, {'data.path': 'stdlib'})
    agreement.check_data(config, self.store())
    python, *_ = json.loads(self.kept[0])[1:]
    self.play(first=False)
    with self.assertRaisesRegex(InputError, words) as caught:
      agreement.check_data(config, self.store(**{what: 'x'}))
    self.assertIn(
      f'that of Python {python} in process 0', str(caught.exception)
    )


class RestoreTest(absltest.TestCase):
  def test_the_step_inside_is_the_step(self):
    config = runs.config(runs.home())
    state = types.SimpleNamespace(step=8)
    checkpoints = mock.Mock(directory=runs.home() / 'run' / 'checkpoints')
    checkpoints.restore.return_value = Restored(state, {}, {})
    got = folder.restore(checkpoints, 8, None, config)
    self.assertIs(got.state, state)
    with self.assertRaisesRegex(InputError, '/99 holds the state of step 8'):
      folder.restore(checkpoints, 99, None, config)
    changed = ds.changed(config, {'seed': 1, 'keep': 3})
    stored = json.loads(json.dumps(ds.to_dict(changed)))
    checkpoints.restore.return_value = Restored(state, {}, stored)
    folder.restore(checkpoints, 8, None, ds.changed(config, {'seed': 1}))
    with self.assertRaisesRegex(
      InputError, r'config.* \(seed: 1 there, 0 here'
    ):
      folder.restore(checkpoints, 8, None, config)


if __name__ == '__main__':
  absltest.main()
