"""Checkpoints come back bit for bit, or say by name why they do not."""

import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.run.checkpoint import Checkpoints, differences, flatten
from deepseek_jax.train import step as train
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import BatchConfig
from tests import tiny

DATA = {'position': 17, 'seed': [1, 2]}


def state(name='v3'):
  """A training state with every kind of leaf, none of them trivial."""
  cfg = train.TrainConfig(
    1e6, BatchConfig(2), optimizer=OptimizerConfig(moments='bfloat16')
  )
  made = train.initial_state(tiny.model(name), cfg, tiny.variables(name))
  rng = np.random.default_rng(0)
  noise = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype)
  return made._replace(
    step=jnp.int32(123),
    sequences=jnp.uint32(4_000_000_000),
    moments=jax.tree.map(lambda a: noise(a) if a.ndim else a + 7, made.moments),
  )


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = Path(folder) / 'checkpoints'

  def store(self, tree, steps=(5,), keep=2):
    config = json.loads(json.dumps(ds.to_dict(tiny.config('v3'))))
    checkpoints = self.enterContext(Checkpoints(self.folder, keep=keep))
    for step in steps:
      checkpoints.save(step, tree, {**DATA, 'position': step}, config)
    checkpoints.wait()
    return checkpoints, config

  def test_everything_comes_back_bit_for_bit(self):
    want = state()
    checkpoints, config = self.store(want, steps=(1, 3, 8))
    self.assertEqual(checkpoints.steps(), [3, 8])
    got = checkpoints.restore(8, jax.eval_shape(lambda: want))
    self.assertEqual(jax.tree.structure(got.state), jax.tree.structure(want))
    kinds = set()
    for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(want)):
      self.assertEqual((a.dtype, a.shape), (b.dtype, b.shape))
      self.assertEqual(np.asarray(a).tobytes(), np.asarray(b).tobytes())
      kinds.add(a.dtype.name)
    self.assertEqual(kinds, {'float32', 'bfloat16', 'int32', 'uint32'})
    self.assertEqual(got.data, {**DATA, 'position': 8})
    self.assertEqual(got.config, config)
    again = ds.from_dict(ds.TransformerConfig, got.config)
    self.assertEqual(again, tiny.config('v3'))

  def test_a_reader_leaves_a_save_under_way_alone(self):
    self.store({'a': jnp.ones(3)})
    begun = self.folder / '6.orbax-checkpoint-tmp'
    begun.mkdir()
    with Checkpoints(self.folder, read_only=True) as reader:
      self.assertEqual(reader.newest_whole(), 5)
      like = {'a': jax.ShapeDtypeStruct((3,), jnp.float32)}
      np.testing.assert_array_equal(reader.restore(5, like).state['a'], 1)
    self.assertTrue(begun.exists())
    # A run that starts again clears it away, in a thread of its own.
    with Checkpoints(self.folder):
      for _ in range(200):
        if not begun.exists():
          break
        time.sleep(0.1)
    self.assertFalse(begun.exists())

  def test_a_saved_state_is_a_copy(self):
    checkpoints = self.enterContext(Checkpoints(self.folder))
    x = jnp.arange(1 << 16, dtype=jnp.float32)
    double = jax.jit(lambda a: a * 2, donate_argnums=0)
    checkpoints.save(1, {'x': x}, {}, {})
    double(x)  # takes the buffer away while the save is under way
    checkpoints.wait()
    got = checkpoints.restore(1, {'x': jax.ShapeDtypeStruct((1 << 16,), 'f4')})
    np.testing.assert_array_equal(got.state['x'], np.arange(1 << 16))

  def test_differences_are_named_and_nothing_is_cast(self):
    stored = {'a': jnp.ones(3), 'b': {'c': jnp.ones((2, 2))}, 'd': jnp.ones(1)}
    checkpoints, _ = self.store(stored)
    wanted = {
      'a': jax.ShapeDtypeStruct((3,), jnp.bfloat16),
      'b': {'c': jax.ShapeDtypeStruct((2, 3), jnp.float32)},
      'e': jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    with self.assertRaises(ds.InputError) as caught:
      checkpoints.restore(5, wanted)
    message = str(caught.exception)
    self.assertIn('/5 is of another model (4 differences)', message)
    self.assertIn('e: missing, expected float32[1]', message)
    self.assertIn('d: float32[1] is stored, the model has none', message)
    self.assertIn('a: float32[3] is stored, expected bfloat16[3]', message)
    self.assertIn(
      'b.c: float32[2, 2] is stored, expected float32[2, 3]', message
    )
    self.assertNotIn('\n', message)

  def test_another_model_is_refused_by_the_names_of_its_weights(self):
    checkpoints, _ = self.store(state('gqa'))
    like = jax.eval_shape(lambda: state('mha'))
    with self.assertRaisesRegex(
      ds.InputError,
      r'params\.segments\.0\.0\.attention\.k: float32\[2, 16, 2, 6\]',
    ):
      checkpoints.restore(5, like)


class NamesTest(parameterized.TestCase):
  def test_names_are_dotted_paths(self):
    tree = {'a': {0: jnp.zeros(1), 1: jnp.zeros(2)}, 'b': (jnp.zeros(3),)}
    shapes = {k: v.shape for k, v in flatten(tree).items()}
    self.assertEqual(shapes, {'a.0': (1,), 'a.1': (2,), 'b.0': (3,)})

  def test_equal_trees_have_no_differences(self):
    flat = flatten(tiny.variables('v3'))
    self.assertEqual(differences(flat, flat), [])
    self.assertIn('params.segments.1.0.attention.q_down', flat)


if __name__ == '__main__':
  absltest.main()
