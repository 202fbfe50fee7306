"""A step of decoding one row copies no cache and lays out no weight anew.

XLA:CPU repeats in each turn of a loop what it cannot move out of it: a copy of
the whole cache for every layer, or weights transposed for products by heads.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.infer import sampling
from deepseek_jax.infer.prepared import prepare
from deepseek_jax.model import cache as caching
from deepseek_jax.parallel.sharding import current
from tests import tiny

SLOTS, NEW = 64, 20


def computations(text: str) -> dict[str, list[str]]:
  """Returns the lines of each computation of a compiled program by name."""
  found, lines = {}, []
  for line in text.splitlines():
    head = re.match(r'(?:ENTRY )?%([\w.\-]+) \(.*\{$', line)
    if head:
      lines = found[head[1]] = []
    elif line.startswith('  '):
      lines.append(line)
  return found


@functools.cache
def loop_of(name: str) -> list[str]:
  """Returns the lines of the loop over tokens, compiled for one row."""
  model = tiny.model(name)
  loop = sampling._loop(model, sampling.SampleConfig(temperature=0), current())
  variables = prepare(model, tiny.variables(name))
  prompt, lengths = jnp.ones((1, 32), jnp.int32), jnp.full(1, 5, jnp.int32)
  row = loop.prefill(variables, prompt, lengths, SLOTS)
  compiled = loop.decode.lower(variables, row, jax.random.key(0), NEW).compile()
  found = computations(compiled.as_text())
  bodies = re.findall(r'body=%([\w.\-]+)', compiled.as_text())
  # The loop over tokens is the one with the most to do.
  return max((found[body] for body in bodies), key=len)


class LoopTest(parameterized.TestCase):
  @parameterized.parameters('v3', 'gqa')
  def test_a_cache_is_written_in_place(self, name):
    shapes = jax.eval_shape(lambda: tiny.model(name).init_cache(1, SLOTS))
    ends = {
      ','.join(map(str, a.shape[2:])) for a in jax.tree.leaves(shapes.layers)
    }
    copy = rf'= f32\[(?:1,)+(?:{"|".join(ends)})\]\S* copy\('
    self.assertEmpty([l for l in loop_of(name) if re.search(copy, l)])

  def test_up_projections_are_laid_out_before_the_loop(self):
    cfg = tiny.MLA
    H, C, N, V = cfg.heads, cfg.kv_rank, cfg.nope_dim, cfg.v_dim
    made = rf'= f32\[{H},(?:{C},{N}|{N},{C}|{V},{C}|{C},{V})\]\S* (\w+)[-(]'
    found = [re.search(made, line) for line in loop_of('v3')]
    self.assertEqual({m[1] for m in found if m}, {'get'})  # -tuple-element

  @parameterized.product(
    rows=(1, 2), slot=(0, 6, 7, 8, 20), valid=(True, False)
  )
  def test_a_slot_is_written_if_it_is_one(self, rows, slot, valid):
    buffer = np.arange(rows * 24, dtype=np.float32).reshape(rows, 8, 3)
    want = buffer.copy()
    if valid and slot < 8:
      want[:, slot] = -1
    where = np.full((rows, 1), slot), np.full((rows, 1), valid)
    new = np.full((rows, 1, 3), -1, np.float32)
    got = jax.jit(caching.write)(buffer, new, *where)
    np.testing.assert_array_equal(got, want)


if __name__ == '__main__':
  absltest.main()
