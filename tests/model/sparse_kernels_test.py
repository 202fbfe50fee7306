"""Sparse attention's numbers don't depend on which code reads the chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention.shared_reading import window_rows
from pallas_kernels import dispatch
from tests import tiny
from tests.infer import families

OPS = {
  'dsa': {'sparse_mla', 'attention_shares'},
  'v4': {'compress', 'sparse_mla', 'attention_shares'},
  'nsa': {'sparse_gqa'},
}


def config(name: str, stage: str = 'sparse') -> ds.TransformerConfig:
  made = families.config(name)
  if stage == 'dense':
    csa = dataclasses.replace(made.attention.csa, stage='dense')
    attention = dataclasses.replace(made.attention, csa=csa)
    made = dataclasses.replace(made, attention=attention)
  return made


def numbers(name: str, stage: str, impl: str | None) -> tuple[list, set]:
  """Logits, gradients, statistics, decoded logits; operations that ran."""
  made = config(name, stage)
  compute = dataclasses.replace(made.compute, kernels=impl)
  model = ds.build(dataclasses.replace(made, compute=compute))
  variables, tokens = families.variables(name), tiny.tokens(2, 24)
  segments = jnp.asarray([[1] * 10 + [2] * 12 + [0] * 2, [1] * 24])

  def loss(params):
    given = {**variables, 'params': params}
    out = model.apply(given, tokens, segment_ids=segments, train=True)
    real = (segments > 0)[..., None]
    logits = jnp.where(real, out.logits, 0)
    stats = [s['attention'] for p in out.aux['segments'] for s in p]
    extra = sum(jnp.sum(s['loss']) for s in stats if 'loss' in s)
    return (logits * jnp.cos(logits)).mean() + extra, (logits, stats)

  def decode():
    cache, out = model.init_cache(2, 24), []
    for begin, end in ((0, 17), (17, 18), (18, 21)):
      found = model.apply(variables, tokens[:, begin:end], cache=cache)
      cache = found.cache
      out.append(found.logits)
    return jnp.concatenate(out, axis=1)

  with dispatch.recorded() as choices:
    found = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
    found = *found, jax.jit(decode)()
  return jax.tree.leaves(found), {c.op for c in choices if c.impl == impl}


class SparseKernelsTest(parameterized.TestCase):
  @parameterized.parameters(('dsa', 'sparse'), ('v4', 'sparse'))
  def test_numbers_are_those_of_the_layers_own_code(self, name, stage):
    self.check(name, stage)

  @parameterized.parameters(('v4', 'dense'), ('nsa', 'sparse'))
  @pytest.mark.slow
  def test_so_are_those_of_the_dense_stage_and_of_nsa(self, name, stage):
    self.check(name, stage)

  def check(self, name, stage):
    own, _ = numbers(name, stage, None)
    other, ops = numbers(name, stage, 'reference')
    wanted = OPS[name] - ({'attention_shares'} if stage == 'dense' else set())
    self.assertLessEqual(wanted, ops)
    for a, b in zip(other, own, strict=True):
      self.assertLess(tiny.relative(a, b), 1e-4)

  def test_a_window_ends_at_its_document_and_at_its_size(self):
    segments = jnp.asarray([[1, 1, 1, 2, 2]])
    rows = window_rows(segments, segments, 3)
    want = [[-1, -1, 0], [-1, 0, 1], [0, 1, 2], [-1, -1, 3], [-1, 3, 4]]
    np.testing.assert_array_equal(rows[0], want)
    # Two tokens before, of which the second is of the first document.
    before = jnp.concatenate([jnp.asarray([[-1, 1]]), segments], axis=1)
    rows = window_rows(segments, before, 3)
    want = [[-1, 1, 2], [1, 2, 3], [2, 3, 4], [-1, -1, 5], [-1, 5, 6]]
    np.testing.assert_array_equal(rows[0], want)


if __name__ == '__main__':
  absltest.main()
