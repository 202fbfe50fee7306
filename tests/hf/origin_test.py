"""Converted folders hold the work of one source, and know it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import chex
import hf_models
import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.hf import identity, record, saving, store
from deepseek_jax.hf.source import Source

# Runs conversions one after the other in a process: [code, last line] of each.
_DRIVER = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from deepseek_jax.cli import convert
from deepseek_jax.errors import InputError
for argv in json.loads(sys.argv[1]):
  with flagsaver.flagsaver():
    flags.FLAGS(['convert', *argv])
    try:
      convert.main([])
      print(json.dumps([0, '']))
    except InputError as error:
      print(json.dumps([2, str(error)]))
"""


def convert(*commands):
  """[(status, error)] of commands of (from, to, *flags)."""
  argv = [[f'--from={a}', f'--to={b}', *flags] for a, b, *flags in commands]
  done = subprocess.run(
    [sys.executable, '-c', _DRIVER, json.dumps(argv)],
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert not done.returncode, done.stderr
  lines = [line for line in done.stdout.splitlines() if line.startswith('[')]
  return [tuple(json.loads(line)) for line in lines]


# Exports a run of step 8 twice, then of step 16, into one folder.
_RUN = """
import json, sys, types
from unittest import mock
import hf_models
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.run import export
variables = hf_models.variables(hf_models.LLAMA)
for step in (8, 8, 16):
  run = mock.MagicMock(step=step, variables=variables)
  run.tokenizer = ByteTokenizer()
  run.config.model, run.config.data.seq_len = hf_models.LLAMA, 64
  with mock.patch.object(export.folder, 'load', return_value=run):
    try:
      export.export_run('x', sys.argv[1])
      print('written')
    except InputError as error:
      print(error)
"""


class Killed(Exception):
  pass


def interrupt(done, total):
  if done > total / 2:
    raise Killed


class OriginTest(parameterized.TestCase):
  """A and B are two models of one configuration."""

  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())
    self.a = hf_models.variables(hf_models.V3)
    self.b = jax.tree.map(lambda x: -x, self.a)
    for name, variables in (('A', self.a), ('B', self.b)):
      hf.save(self.path(name), hf_models.V3, variables)

  def path(self, name):
    return os.path.join(self.root, name)

  def write(self, target, variables, source, quantize=None, **options):
    wanted = saving.Format('float32', quantize, shard_bytes=4000)
    arrays = {
      leaf.path: saving._array(variables, leaf)
      for leaf in saving.names.leaves(hf_models.V3)
    }
    read = saving._reader(arrays)
    saving.write(target, hf_models.V3, read, wanted, source=source, **options)

  def test_another_model_of_the_same_shapes_is_refused(self):
    a, b, s, h = map(self.path, ('A', 'B', 'store', 'folder'))
    t = self.path('store_of_b')
    same, other, back, again, kept, moved = convert(
      (a, s, '--dtype=float32'),
      (b, s, '--dtype=float32'),
      (s, h),
      (s, h),
      (b, t, '--dtype=float32'),
      (t, h),
    )
    self.assertEqual([same[0], back[0], again[0], kept[0]], [0] * 4)
    self.assertEqual(other[0], 2)
    self.assertIn('was begun with another source.model.safetensors', other[1])
    self.assertEqual(moved[0], 2)
    self.assertIn('was begun with another source', moved[1])
    chex.assert_trees_all_equal(hf.restore(s)[1], self.a)
    chex.assert_trees_all_equal(hf.load(h, mtp=True)[1], self.a)

  def test_quantisations_do_not_mix(self):
    a, h = self.path('A'), self.path('fp8')
    first, other, same = convert(
      (a, h, '--as=hf', '--quantize=fp8'),
      (a, h, '--as=hf', '--quantize=fp8_ue8m0'),
      (a, h, '--as=hf', '--quantize=fp8'),
    )
    self.assertEqual((first[0], same[0]), (0, 0))
    self.assertEqual(other[0], 2)
    self.assertIn('another format.quantize', other[1])
    self.assertNotIn('scale_fmt', Path(h, 'config.json').read_text())

  def test_killed_store_goes_on_with_its_own_source_alone(self):
    source, s = Source(self.path('A'), mtp=None), self.path('store')
    notes = {
      'carried': source.carried,
      'source': identity.of_folder(source.folder),
    }
    store.create(s, source.config, 'float32', notes=notes)
    with self.assertRaises(Killed):
      store.Store(s).fill(source.read, progress=interrupt)
    other, same = convert(
      (self.path('B'), s, '--dtype=float32'),
      (self.path('A'), s, '--dtype=float32'),
    )
    self.assertEqual((other[0], same[0]), (2, 0), other)
    chex.assert_trees_all_equal(hf.restore(s)[1], self.a)

  @parameterized.parameters(None, 'fp8')
  def test_killed_folder_goes_on_with_its_own_source_alone(self, quantize):
    h = self.path('h')
    with self.assertRaises(Killed):
      self.write(h, self.a, 'A', quantize, progress=interrupt)
    with self.assertRaisesRegex(InputError, 'config.json|not written to the'):
      hf.load(h)
    with self.assertRaisesRegex(InputError, 'begun with another source'):
      self.write(h, self.b, 'B', quantize)
    with self.assertRaisesRegex(InputError, 'another format.quantize'):
      self.write(h, self.a, 'A', 'fp8_ue8m0')
    seen = []
    real = saving._write_shard
    count = lambda file, *rest: seen.append(file) or real(file, *rest)
    with mock.patch.object(saving, '_write_shard', count):
      self.write(h, self.a, 'A', quantize)
    shards = [f for f in os.listdir(h) if f.endswith('.safetensors')]
    self.assertBetween(len(seen), 1, len(shards) - 1)  # half of them were done
    straight = self.path('straight')
    self.write(straight, self.a, 'A', quantize)
    for name in (*shards, 'config.json'):
      same = Path(h, name).read_bytes() == Path(straight, name).read_bytes()
      self.assertTrue(same, name)

  def test_a_killed_save_over_a_model_is_no_model(self):
    h = self.path('h')
    self.write(h, self.a, None)
    with self.assertRaises(Killed):
      self.write(h, self.b, None, replace=True, progress=interrupt)
    with self.assertRaisesRegex(InputError, 'not written to the end'):
      hf.load(h)
    self.write(h, self.b, None, replace=True)
    chex.assert_trees_all_equal(hf.load(h, mtp=True)[1], self.b)

  def test_weights_of_unknown_origin_are_kept(self):
    h = self.path('A')
    os.remove(os.path.join(h, record.FILE))
    before = Path(h, 'model.safetensors').read_bytes()
    with self.assertRaisesRegex(InputError, 'no conversion here has written'):
      self.write(h, self.b, 'B')
    self.assertEqual(Path(h, 'model.safetensors').read_bytes(), before)

  def test_a_shard_that_was_changed_is_named(self):
    h = self.path('h')
    self.write(h, self.a, 'A')
    shard = sorted(Path(h).glob('model-*'))[2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with self.assertRaisesRegex(InputError, f'{shard.name}: is not what'):
      self.write(h, self.a, 'A')

  def test_two_conversions_at_once(self):
    h = self.path('h')
    os.makedirs(h)
    with (
      record.alone(h),
      self.assertRaisesRegex(InputError, 'another conversion is writing'),
    ):
      self.write(h, self.a, 'A')
    Path(h, 'model.safetensors.0123abcd.part').write_bytes(b'of a killed one')
    self.write(h, self.a, 'A')
    self.assertEmpty([f for f in os.listdir(h) if f.endswith('.part')])

  def test_another_step_of_a_run_is_refused(self):
    done = subprocess.run(
      [sys.executable, '-c', _RUN, self.path('h')],
      capture_output=True,
      text=True,
      env=os.environ
      | {
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': os.pathsep.join(map(str, sys.path)),
      },
    )
    *same, other = done.stdout.splitlines() or [done.stderr]
    self.assertEqual(same, ['written', 'written'], done.stderr)
    self.assertIn('was begun with another source.step', other)

  def test_source_and_target_are_not_one(self):
    ((status, line),) = convert((self.path('A'), self.path('A'), '--as=hf'))
    self.assertEqual(status, 2)
    self.assertIn('is the folder of --from', line)


class IdentityTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  @parameterized.parameters(1 << 30, 0)
  def test_every_tensor_counts(self, whole):
    """Also where files are sampled: one number in each tensor is changed."""
    tensors = {
      'small': (np.dtype('f4'), (10,)),
      'big': (np.dtype('f4'), (300, 400)),
    }
    path = os.path.join(self.root, 'x.safetensors')

    def digest(**change):
      writer = saving.safetensors_io.Writer(path, tensors)
      for name, (dtype, shape) in tensors.items():
        writer.write(name, np.full(shape, change.get(name, 1.0), dtype))
      writer.close()
      return identity.of_file(path)

    with mock.patch.object(identity, 'WHOLE', whole):
      first = digest()
      self.assertEqual(first, digest())
      for name in tensors:
        other = digest(**{name: 1.5})
        self.assertEqual(other[0], first[0])  # the same size
        self.assertNotEqual(other, first, name)

  def test_variables(self):
    a = hf_models.variables(hf_models.LLAMA)
    b = jax.tree.map(lambda x: x, a)
    self.assertEqual(identity.of_variables(a), identity.of_variables(b))
    b['params']['norm']['scale'] = b['params']['norm']['scale'].at[0].add(1)
    self.assertNotEqual(identity.of_variables(a), identity.of_variables(b))


class DamagedStoreTest(parameterized.TestCase):
  """Every byte of a store is vouched for."""

  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())
    self.config = ds.changed(hf_models.LLAMA, {'tied': False})
    self.variables = hf_models.variables(self.config)
    folder = os.path.join(self.root, 'hf')
    hf.save(folder, self.config, self.variables)
    source, self.store = Source(folder), os.path.join(self.root, 'store')
    store.create(self.store, source.config, 'float32')
    store.Store(self.store).fill(source.read)

  def test_whole_store_is_read(self):
    chex.assert_trees_all_equal(hf.restore(self.store)[1], self.variables)

  def test_every_flipped_bit_is_found(self):
    draw = np.random.default_rng(0)
    files = [p for p in Path(self.store).rglob('*') if p.is_file()]
    self.assertGreater(len(files), 20)
    for path in files:
      before = path.read_bytes()
      if not before:
        continue
      data = bytearray(before)
      data[draw.integers(len(data))] ^= 1 << draw.integers(8)
      path.write_bytes(data)
      with self.assertRaises(InputError, msg=str(path)):
        hf.restore(self.store)
      path.write_bytes(before)

  @parameterized.parameters('', 'cut', 'longer', None)
  def test_cut_chunk_is_one_line(self, how):
    path = Path(self.store, 'variables', 'params.embed', '0.0')
    data = path.read_bytes()
    changed = {'': b'', 'cut': data[:-5], 'longer': data + b'x'}
    path.unlink()
    if how is not None:
      path.write_bytes(changed[how])
    for verify in ('full', 'off'):
      with self.assertRaisesRegex(InputError, 'bytes|incomplete'):
        hf.restore(self.store, verify=verify)

  @parameterized.parameters('config', 'dtype', 'notes')
  def test_model_json_without_a_field_is_one_line(self, field):
    path = Path(self.store, store.MODEL)
    about = json.loads(path.read_text())
    del about[field]
    path.write_text(json.dumps(about))
    with self.assertRaisesRegex(InputError, store.MODEL):
      hf.restore(self.store)
    for manifest in Path(self.store).glob('manifest-*'):
      manifest.unlink()
    with self.assertRaisesRegex(InputError, f'{field} is missing'):
      hf.restore(self.store)

  def test_a_store_without_its_manifest_is_incomplete(self):
    os.remove(os.path.join(self.store, 'manifest-0-of-1.json'))
    with self.assertRaisesRegex(InputError, 'incomplete; run the conversion'):
      hf.restore(self.store)


if __name__ == '__main__':
  absltest.main()
