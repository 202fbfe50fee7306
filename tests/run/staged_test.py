"""Training through a pipeline is training without one.

Float32: sums of floats in another order, so 1e-5 of the greatest value; what
counts tokens, and biases, which move by the sign of a count, exactly. Moments
in bfloat16 may round the other way, 2^-7 of a number of 8 bits. Muon turns
rounding of its momenta up to 1e-4 (it divides by small singular values).
"""

import functools

import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.run import staged_steps as staged
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train import step as train
from deepseek_jax.train.schedules import BatchConfig
from tests import fake_devices, tiny
from tests.run import staged_runs, staged_worker


class StepTest(parameterized.TestCase):
  def check(self, cases, devices):
    results = fake_devices.run(
      'tests.run.staged_worker', *cases, devices=devices
    )
    for name, found in results.items():
      with self.subTest(name):
        self.holds(name, found)

  def holds(self, name, found):
    self.assertTrue(found['metrics'])
    self.assertTrue(found['form'])
    self.assertEqual(found['begun'], 0)
    self.assertEqual(found['counts'], 0)
    self.assertEqual(found['buffers'], 0)
    self.assertEqual(
      found['counters'],
      [staged_worker.STEPS, staged_worker.STEPS * staged_worker.B],
    )
    for key, value in found['scalars'].items():
      self.assertLess(value, 1e-5, key)
    for part in ('params', 'moments', 'gate'):
      limit = {('bfloat16', 'moments'): 2**-7}.get((name, part), 1e-5)
      self.assertLess(found[part], 1e-4 if name == 'muon' else limit, part)
    self.assertEqual(found['skipped'], 2 if name == 'skipped' else 0)

  @pytest.mark.slow
  def test_steps_on_two_stages_are_those_of_one_program(self):
    self.check(['stage=2'], 2)

  @pytest.mark.slow
  def test_of_any_model_and_recipe(self):
    self.check([n for n in staged_worker.CASES if n != 'stage=2'], 4)


@functools.cache
def runs():
  return fake_devices.run('tests.run.staged_runs', devices=4)


@pytest.mark.slow
class RunTest(parameterized.TestCase):
  @parameterized.parameters(
    *((name,) for name in staged_runs.MESHES),
    *((f'{a} to {b}',) for a, b in staged_runs.MOVES if a != b),
  )
  def test_a_run_is_the_one_of_one_device(self, name):
    found = runs()[name]
    self.assertEqual(found['steps'], staged_runs.STEPS)
    for key in ('loss', 'grad_norm', 'validation_bits_per_byte'):
      self.assertLess(found[key], 1e-5, key)
    # Adam divides by small moments: rounding moves an update of 3e-3 a little.
    self.assertLess(found['parameters'], 1e-3)
    self.assertEqual(found['bias'], 0)

  @parameterized.parameters('2 stages', 'dualpipe')
  def test_a_run_goes_on_bit_for_bit(self, name):
    self.assertTrue(runs()[f'{name} to {name}']['bits'])


def _config(layers=4, accumulate=4, **mesh) -> RunConfig:
  model = ds.changed(tiny.config('step'), {'layout': ((('moe',), layers - 1),)})
  return RunConfig(
    model,
    datalib.DataConfig(vocab_size=tiny.VOCAB, seq_len=12),
    train.TrainConfig(1e6, BatchConfig(4, accumulate=accumulate)),
    mesh=MeshConfig(**mesh),
  )


class MistakesTest(parameterized.TestCase):
  """One line each, before anything is compiled."""

  def refused(self, config, words):
    with self.assertRaisesRegex(ds.InputError, words):
      staged.StagedSteps(ds.build(config.model), config)

  @parameterized.parameters(
    (
      {'accumulate': 2, 'stage': 4},
      r'train.batch.accumulate = 2: .* mesh.stage = 4.* set it to 4',
    ),
    (
      {'stage': 2, 'accumulate': 2, 'schedule': 'dualpipe'},
      r'train.batch.accumulate = 2: dualpipe .* mesh.stage = 2 .* 4 or more',
    ),
    (
      {'stage': 3, 'schedule': 'dualpipe'},
      r'mesh.stage = 3: mesh.schedule = dualpipe .* even .* 4',
    ),
    (
      {'stage': 4, 'layers': 3},
      r'mesh.stage = 4: more than the 3 blocks; set it to 3 or less',
    ),
    (
      {'stage': 2, 'data': 2},
      r'train.batch: 4 sequences .* 2 shards .* 4 micro-batches.* of 8',
    ),
    ({'stage': 2, 'expert': 3, 'accumulate': 2}, r'train.batch: 4 seq.* of 6'),
    (
      {'stage': 2, 'rules': {**MeshConfig().rules, 'embed': 'stage'}},
      r"mesh.rules.embed = 'stage': .* name another axis",
    ),
    ({'stage': 4}, r'mesh: stage=4 makes 4 devices, but there are 1'),
  )
  def test_what_cannot_be_cut_is_refused(self, changes, words):
    self.refused(_config(**changes), words)

  def test_several_processes_are_refused(self):
    config = _config(stage=2)
    with absltest.mock.patch('jax.process_count', return_value=2):
      self.refused(config, r'mesh.stage = 2 in a run of 2 processes: .* 1 and')

  def test_schedules_go_by_their_names(self):
    for name, both in (('1f1b', False), ('dualpipe', True)):
      made = staged.schedule(MeshConfig(stage=2, schedule=name), 4)
      chunks = {c for rank in made for step in rank for c in step}
      self.assertEqual(any(c.direction for c in chunks), both)

  def test_an_unknown_schedule_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, "mesh.schedule = 'gpipe'.*1f1b"):
      ds.changed(_config(), {'mesh.schedule': 'gpipe'})


if __name__ == '__main__':
  absltest.main()
