import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import chex
import hf_models
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.hf import chunks, names, store
from deepseek_jax.hf.source import Source

_RULES = {'experts': 'expert', 'embed': 'fsdp', 'heads': 'tensor'}


def _run(*flags, module='experiments.convert', **options):
  command = [sys.executable, '-m', module, *flags]
  return subprocess.run(command, capture_output=True, text=True, **options)


class StoreTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())
    self.hf = os.path.join(self.root, 'hf')
    self.store = os.path.join(self.root, 'store')
    self.variables = hf_models.variables(hf_models.V3)
    hf.save(self.hf, hf_models.V3, self.variables)

  def filled(self, **options):
    source = Source(self.hf, mtp=True)
    store.create(self.store, source.config, 'float32')
    opened = store.Store(self.store)
    opened.fill(source.read, **options)
    return opened

  def test_restored_equals_loaded(self):
    self.filled()
    config, back = hf.restore(self.store)
    chex.assert_trees_all_equal(back, self.variables)
    self.assertEqual(config, Source(self.hf, mtp=True).config)

  def test_orbax_restores_it(self):
    import orbax.checkpoint as ocp

    self.filled()
    with ocp.StandardCheckpointer() as checkpointer:
      back = checkpointer.restore(
        os.path.join(self.store, store.VARIABLES), store.abstract(self.store)
      )
    chex.assert_trees_all_equal(back, self.variables)

  def test_bfloat16_keeps_what_must_be_float32(self):
    source = Source(self.hf, mtp=True)
    store.create(self.store, source.config, 'bfloat16')
    store.Store(self.store).fill(source.read)
    _, back = hf.restore(self.store)
    _, wanted = hf.load(self.hf, dtype='bfloat16', mtp=True)
    chex.assert_trees_all_equal(back, wanted)
    chex.assert_trees_all_equal_dtypes(back, wanted)

  def test_interrupted_work_is_refused_then_finished(self):
    class Killed(Exception):
      pass

    def interrupt(done, total):
      if done > total / 2:
        raise Killed

    with self.assertRaises(Killed):
      self.filled(progress=interrupt)
    with self.assertRaisesRegex(InputError, 'incomplete; run the conversion'):
      hf.restore(self.store)
    source, read = Source(self.hf, mtp=True), []
    opened = store.Store(self.store)
    opened.fill(lambda *a: read.append(a) or source.read(*a))
    self.assertLess(len(read), len(list(self._chunks())) * 0.7)
    chex.assert_trees_all_equal(hf.restore(self.store)[1], self.variables)

  def _chunks(self):
    for path in Path(self.store, store.VARIABLES).rglob('*'):
      if path.is_file() and path.name[0].isdigit():
        yield path

  def test_store_of_other_work_is_not_touched(self):
    self.filled()
    source = Source(self.hf, mtp=True)
    # A version that had a field less is no other work.
    path = Path(self.store, store.MODEL)
    about = json.loads(path.read_text())
    del about['config']['compute']['cache']
    path.write_text(json.dumps(about))
    store.create(
      self.store, source.config, about['dtype'], notes=about['notes']
    )
    with self.assertRaisesRegex(InputError, 'begun with another dtype'):
      store.create(self.store, source.config, 'bfloat16')
    os.makedirs(os.path.join(self.root, 'full', 'things'))
    with self.assertRaisesRegex(InputError, 'is there and not empty'):
      full = os.path.join(self.root, 'full')
      store.create(full, source.config, 'float32')

  @parameterized.parameters(
    ({'expert': 2}, 2),
    ({'fsdp': 2, 'expert': 2}, 4),
    ({'tensor': 2, 'fsdp': 3}, 2),
  )
  def test_processes_share_the_work_and_read_only_theirs(self, mesh, processes):
    source = Source(self.hf, mtp=True)
    read = []
    for process in range(processes):
      share = chunks.Share(mesh, _RULES, process, processes)
      store.create(self.store, source.config, 'float32', share=share)
      seen = 0

      def counted(leaf, region):
        nonlocal seen
        block = source.read(leaf, region)
        seen += block.nbytes
        return block

      store.Store(self.store).fill(counted, share)
      read.append(seen)
    chex.assert_trees_all_equal(hf.restore(self.store)[1], self.variables)
    whole = sum(a.nbytes for a in jax.tree.leaves(self.variables))
    self.assertEqual(sum(read), whole)  # every byte once
    self.assertGreater(min(read), 0)

  def test_owner_is_where_jax_puts_the_shard(self):
    """Against NamedSharding on 8 devices, in a process that has them."""
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding
from deepseek_jax.parallel import sharding
from deepseek_jax.hf import chunks, names, store
import hf_models
mesh = jax.make_mesh((2, 2, 2), ('fsdp', 'expert', 'tensor'))
rules = {'experts': ('expert', 'fsdp'), 'embed': 'fsdp', 'heads': 'tensor'}
for leaf in names.leaves(hf_models.V3):
  rules_ = rules if 'experts' not in leaf.axes else rules | {'embed': None}
  share = chunks.Share(dict(mesh.shape), rules_, 0, 4)
  place = NamedSharding(mesh, sharding.spec(leaf.axes, rules_, len(leaf.shape)))
  counts = chunks.shard_counts(leaf, share)
  where = place.devices_indices_map(leaf.shape)
  held = {}
  for device, index in where.items():
    shard = tuple(
      (i.start or 0) // (n // c) for i, n, c in zip(index, leaf.shape, counts)
    )
    held.setdefault(shard, set()).add(device.id // 2)
  assert len(held) == np.prod(counts), leaf.name
  for shard, processes in held.items():
    first = chunks.owner(leaf, shard, share)
    assert first == min(processes), (leaf.name, shard)
print('same')
"""
    flags = '--xla_force_host_platform_device_count=8'
    path = os.path.dirname(hf_models.__file__)
    env = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': path}
    env['JAX_PLATFORMS'] = 'cpu'
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, env=env
    )
    self.assertEqual(done.stdout, 'same\n', done.stderr)

  def test_uneven_shards_are_an_error(self):
    leaf = names.leaves(hf_models.V3)[-1]
    share = chunks.Share({'fsdp': 7}, {a: 'fsdp' for a in leaf.axes if a})
    if any(leaf.axes):
      with self.assertRaisesRegex(InputError, 'not divisible by the 7'):
        chunks.shard_counts(leaf, share)


class ConvertTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def path(self, name):
    return os.path.join(self.root, name)

  def test_there_and_back_is_the_same_folder(self):
    variables = hf_models.variables(hf_models.V3)
    extra = {'eos_token_id': [1, 7], 'max_position_embeddings': 99}
    hf.save(
      self.path('a'), hf_models.V3, variables, dtype='bfloat16', extra=extra
    )
    Path(self.path('a'), 'tokenizer.json').write_text('{}')
    Path(self.path('a'), 'generation_config.json').write_text('{"eos": 1}')
    done = _run(f'--from={self.path("a")}', f'--to={self.path("store")}')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('layers.3.embed_tokens.weight is not used', done.stdout)
    done = _run(f'--from={self.path("store")}', f'--to={self.path("b")}')
    self.assertEqual(done.returncode, 0, done.stderr)
    carried = hf.store.Store(self.path('store')).notes['carried']
    self.assertEqual(carried['eos_token_id'], [1, 7])
    files = ['config.json', 'model.safetensors', 'tokenizer.json']
    files.append('generation_config.json')
    same, *other = filecmp.cmpfiles(
      self.path('a'), self.path('b'), files, False
    )
    self.assertEqual(same, files, other)

  @parameterized.named_parameters(
    ('no_folder', ['--from={root}/none', '--to={root}/b'], 'is no folder'),
    ('no_config', ['--from={root}', '--to={root}/b'], 'config.json: cannot'),
    (
      'mesh',
      ['--from={root}/a', '--to={root}/b', '--shard-to=moon=2'],
      'AXIS=SIZE',
    ),
    (
      'process',
      ['--from={root}/a', '--to={root}/b', '--process=3'],
      'must lie in 0..0',
    ),
  )
  def test_bad_input_is_one_line_and_status_2(self, flags, message):
    llama = hf_models.LLAMA
    hf.save(self.path('a'), llama, hf_models.variables(llama))
    done = _run(*(flag.format(root=self.root) for flag in flags))
    self.assertEqual(done.returncode, 2, done.stderr)
    line = done.stderr.strip().splitlines()[-1]
    self.assertStartsWith(line, 'error: ')
    self.assertIn(message, line)
    self.assertNotIn('Traceback', done.stderr)


@pytest.mark.slow
class BigTest(absltest.TestCase):
  """A checkpoint of 6.9 GiB; takes minutes and 21 GiB of disk."""

  def test_memory_stays_bounded_and_a_kill_costs_little(self):
    root = self.enterContext(tempfile.TemporaryDirectory())
    paths = [os.path.join(root, n) for n in ('hf', 'store', 'back')]
    script = os.path.join(os.path.dirname(__file__), 'big_checkpoint.py')
    subprocess.run([sys.executable, script, paths[0]], check=True)
    size = sum(f.stat().st_size for f in Path(paths[0]).iterdir())
    self.assertGreater(size, 6 << 30)
    largest = max(e.nbytes for e in Source(paths[0]).entries.values())
    limit = (2 << 30) + largest
    self._kill_after(10, *paths[:2])
    begun = time.time() - 1
    for pair in (paths[:2], paths[1:]):
      status, peak = self._peak(*pair)
      self.assertEqual(status, 0)
      print(f'peak {peak / 2**20:.0f} MiB of {limit / 2**20:.0f}')
      self.assertLess(peak, limit)
    chunks = Path(paths[1], store.VARIABLES).rglob('[0-9]*')
    kept = [f for f in chunks if f.is_file() and f.stat().st_mtime < begun]
    self.assertGreater(len(kept), 0)
    self._assert_same(paths[0], paths[2])

  def _start(self, source, target):
    command = [sys.executable, '-m', 'experiments.convert']
    command += [f'--from={source}', f'--to={target}']
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)

  def _kill_after(self, seconds, source, target):
    process = self._start(source, target)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    self.assertEqual(process.wait(), -signal.SIGKILL)

  def _peak(self, source, target):
    process = self._start(source, target)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024

  def _assert_same(self, a, b):
    a, b = Source(a), Source(b)
    draw = np.random.default_rng(0)
    for leaf in a.leaves:
      corner = [int(draw.integers(n)) for n in leaf.shape]
      region = tuple(
        slice(c, min(c + 2, n)) for c, n in zip(corner, leaf.shape)
      )
      x, y = a.read(leaf, region), b.read(leaf, region)
      np.testing.assert_array_equal(x, y, leaf.name)


if __name__ == '__main__':
  absltest.main()
