"""Checks that what a run leaves to the machine is chosen once, and kept."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.parallel import processor
from deepseek_jax.run import folder
from deepseek_jax.run.chosen import chosen

AMX = processor.Processor(
  'GenuineIntel', frozenset(('avx512f', 'amx_bf16', 'amx_tile'))
)
AMD = processor.Processor('AuthenticAMD', frozenset(('avx2',)))
YNN = (('xla_cpu_experimental_ynn_fusion_type', ''),)
OPEN = ds.changed(ds.recipes.v3_tiny(), {'model.compute.dtype': None})


class ChosenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(tempfile.mkdtemp()) / 'run'

  def on(self, machine):
    return mock.patch.object(processor, 'this', lambda: machine)

  def claimed(self, machine, config=OPEN):
    """Returns what `fit` would run, and how config.json differs from it."""
    with self.on(machine):
      made = chosen(config, self.workdir)
    changes = folder.claim(self.workdir, made)
    return made, changes

  def written(self):
    return json.loads((self.workdir / 'config.json').read_text())

  @parameterized.parameters(
    (AMX, AMD, 'bfloat16', YNN), (AMD, AMX, 'float32', ())
  )
  def test_a_run_keeps_what_the_first_machine_chose(
    self, first, then, dtype, xla
  ):
    for machine in (first, then):
      try:
        made, changes = self.claimed(machine)
      except ds.InputError as error:
        self.fail(str(error))
      self.assertEqual(made.model.compute.dtype, dtype)
      self.assertEqual(made.model.compute.xla, xla)
      self.assertEqual(changes, [])
    compute = self.written()['model']['compute']
    self.assertEqual(compute['dtype'], dtype)
    self.assertEqual(compute['xla'], [list(pair) for pair in xla])
    # So do replay and sampling, which read the file alone.
    self.assertEqual(folder.config_of(self.workdir), made)

  def test_what_the_configuration_says_stays(self):
    said = {'model.compute.dtype': 'float32', 'model.compute.xla': ()}
    config = ds.changed(OPEN, said)
    made, _ = self.claimed(AMX, config)
    self.assertEqual(made, config)

  def test_a_run_of_another_dtype_is_still_another_run(self):
    self.claimed(AMX)
    with self.assertRaisesRegex(ds.InputError, r'model\.compute\.dtype'):
      self.claimed(AMX, ds.changed(OPEN, {'model.compute.dtype': 'float32'}))

  def test_options_may_change_as_a_run_goes_on(self):
    self.claimed(AMX)
    _, changes = self.claimed(AMX, ds.changed(OPEN, {'model.compute.xla': ()}))
    self.assertNotEmpty(changes)
    for line in changes:
      self.assertStartsWith(line, 'model.compute.xla')

  def test_a_run_of_before_goes_on_as_it_was(self):
    self.claimed(AMD)
    path = self.workdir / 'config.json'
    old = self.written()
    del old['model']['compute']['xla']
    path.write_text(json.dumps(old))
    config = ds.changed(OPEN, {'model.compute.dtype': 'float32'})
    for given in (config, OPEN):
      made, changes = self.claimed(AMX, given)
      self.assertEqual(changes, [])
      self.assertEqual(made.model.compute.dtype, 'float32')
      self.assertIsNone(made.model.compute.xla)

  @parameterized.parameters('', '[]', '{"model": 3}', '{', '[' * 100_000)
  def test_a_broken_file_is_named_by_claim(self, text):
    self.claimed(AMD)
    (self.workdir / 'config.json').write_text(text)
    with self.on(AMX):
      made = chosen(OPEN, self.workdir)
    self.assertEqual(made.model.compute.dtype, 'bfloat16')
    with self.assertRaises(ds.InputError):
      folder.claim(self.workdir, made)


if __name__ == '__main__':
  absltest.main()
