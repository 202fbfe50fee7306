"""A TPU's compiler takes the kernels, on a host without a TPU; needs libtpu.

It lays out registers and vector memory, which neither the export nor the
interpreter does; nothing runs.
"""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import topologies

import deepseek_jax as ds
from pallas_kernels import target
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.mla_decode import mla_decode
from tests.model.kernels_mesh_worker import config
from tests.pallas_kernels import tpu_export_test

TOPOLOGIES = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


@functools.cache
def device(name: str) -> jax.Device:
  # Else it asks the data centre that it runs in, by the network.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_WORKER_ID', '0')
  return topologies.get_topology_desc(TOPOLOGIES[name], 'tpu').devices[0]


def kernels(fn, args, name: str) -> set[str]:
  """Returns the names of the kernels in fn(*args), compiled for a TPU."""
  sharding = jax.sharding.SingleDeviceSharding(device(name))
  place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  fresh = jax.jit(lambda *args: fn(*args))
  with target.targeting('tpu'):
    traced = fresh.trace(*jax.tree.map(place, args))
  text = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
  calls = [line for line in text.splitlines() if 'tpu_custom_call"' in line]
  return {re.search(r'%([\w-]+?)[.\d]* =', line)[1] for line in calls}


@pytest.mark.slow
@absltest.skipIf(
  importlib.util.find_spec('libtpu') is None, 'libtpu is not installed'
)
class CompileTest(parameterized.TestCase):
  @parameterized.product(
    name=sorted(TOPOLOGIES),
    case=(
      (1, 128, 64, BF16, 128),
      (2, 128, 128, BF16, 128),
      (6, 128, 64, BF16, 4),
      (1, 16, 64, BF16, 3),
      (1, 1, 16, BF16, 1),
      (1, 128, 4096, BF16, 4),
      (1, 128, 320, F32, 4),
      (3, 5, 32, F32, 4),
    ),
  )
  def test_decoding(self, name, case):
    new, heads, page, dtype, batch = case
    args = tpu_export_test.of_pages(new, heads, page, dtype, batch=batch)
    fn = functools.partial(mla_decode, scale=0.07)
    self.assertEqual(kernels(fn, args, name), {'mla_decode'})

  @parameterized.product(
    name=sorted(TOPOLOGIES),
    case=[*sorted(grouped_shapes.BENCH), 'float32'],
  )
  def test_gradients_of_experts(self, name, case):
    known, dtype = grouped_shapes.BENCH.get(case), BF16
    if known is None:
      known, dtype = grouped_shapes.Shape((256,) * 4, 7168, 2048, 128), F32
    counts = known.counts[:4]  # of all of them a TPU doesn't hold the sums
    E, blocks = len(counts), sum(counts) // known.block
    shape = jax.ShapeDtypeStruct
    args = (
      shape((blocks * known.block, known.dim), dtype),
      shape((E, known.dim, known.out), dtype),
      shape((blocks,), I32),
      shape((), I32),
    )
    found = kernels(tpu_export_test.gradients, args, name)
    self.assertContainsSubset({'gmm', 'tgmm'}, found)

  def test_a_model_decodes(self):
    model = ds.build(config('v3'))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    run = lambda v, t, c: model.apply(v, t, cache=c)
    tokens = lambda n: jax.ShapeDtypeStruct((2, n), I32)
    empty = jax.eval_shape(lambda: model.init_cache(2, 320))
    cache = jax.eval_shape(run, variables, tokens(256), empty).cache
    found = kernels(run, (variables, tokens(1), cache), 'v5e')
    self.assertIn('mla_decode', found)


if __name__ == '__main__':
  absltest.main()
