"""Weights for decoding: one copy of them, where the caller gives its own up."""

import functools
import gc
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.infer import prepared as lib
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.lora import LoRAConfig
from tests import tiny

CASES = ('v3', 'v3 bfloat16', 'gqa', 'mixed', 'v3 lora', 'v3 lora bfloat16')
SMALL = EngineConfig(
  slots=1, context=32, page=8, budget=16, steps=2, contexts=(32,)
)


@functools.cache
def case(name):
  """Returns a model and its variables on the host, every weight its own."""
  family, *options = name.split()
  changes = {}
  if 'bfloat16' in options:
    changes['compute.dtype'] = 'bfloat16'
  if 'lora' in options:
    changes['lora'] = LoRAConfig(rank=2, names=('experts', 'out', 'q_up'))
    if family == 'v3':
      changes['lora'] = LoRAConfig(rank=2, names=('out', 'q_up'))
  model = ds.build(ds.changed(tiny.model(family).config, changes))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(0)

  def fill(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return np.zeros(leaf.shape, leaf.dtype)
    return rng.normal(size=leaf.shape).astype(leaf.dtype)

  return model, jax.tree.map(fill, shapes)


def on_device(host):
  """Returns a copy that the caller can give up."""
  return jax.tree.map(lambda a: jnp.array(a, copy=True), host)


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def live():
  """Returns the bytes of the arrays that are held by anything."""
  gc.collect()
  return sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted())


class PrepareTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_donated_gives_the_same_as_copied(self, name):
    model, host = case(name)
    want = lib.prepare(model, on_device(host))
    got = lib.prepare(model, on_device(host), donate=True)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(want))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      self.assertEqual(one.dtype, other.dtype)
      np.testing.assert_array_equal(np.asarray(one), np.asarray(other))

  @parameterized.parameters(*CASES)
  def test_donated_leaves_one_copy(self, name):
    model, host = case(name)
    variables = on_device(host)
    before = live() - size(variables)
    got = lib.prepare(model, variables, donate=True)
    # What was given is a part of the result, or gone.
    kept = set(map(id, jax.tree.leaves(got)))
    for leaf in jax.tree.leaves(variables):
      self.assertTrue(leaf.is_deleted() or id(leaf) in kept)
    self.assertEqual(live() - before, size(got))

  def test_copied_leaves_the_callers_own(self):
    model, host = case('v3')
    variables = on_device(host)
    lib.prepare(model, variables)
    for leaf in jax.tree.leaves(variables):
      self.assertFalse(leaf.is_deleted())

  @parameterized.parameters(['v3'])
  def test_at_no_time_are_there_two_copies(self, name):
    self.check(name)

  @parameterized.parameters('v3 bfloat16', 'mixed')
  @pytest.mark.slow
  def test_nor_of_other_dtypes(self, name):
    self.check(name)

  def check(self, name):
    model, host = case(name)
    variables = on_device(host)
    whole = size(variables)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(variables))
    before, peaks, real = live() - whole, [], lib._layers

    def watched(*args):
      made = real(*args)
      peaks.append(live() - before)
      return made

    with mock.patch.object(lib, '_layers', watched):
      lib.prepare(model, variables, donate=True)
    self.assertNotEmpty(peaks)
    self.assertLessEqual(max(peaks), whole + largest)
    self.assertLess(whole + largest, 1.6 * whole)  # it is a bound at all

  def test_layers_that_are_apart_are_not_copied(self):
    model, host = case('v3')
    flat = lib.build_flat(model)
    variables = lib.prepare(model, on_device(host), donate=True)
    again = lib.prepare(flat, variables, donate=True)
    for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(again)):
      self.assertIs(one, other)
    # Segments of one repeat each, written as one pattern: other paths alone.
    names = tuple(n for (n,), _ in flat.config.layout)
    model = ds.build(ds.changed(flat.config, {'layout': ((names, 1),)}))
    blocks = variables['params']['segments']
    pattern = {i: blocks[i][0] for i in blocks}
    params = {**variables['params'], 'segments': {0: pattern}}
    held = {
      i: layer[0] for i, layer in variables['buffers']['segments'].items()
    }
    buffers = {**variables['buffers'], 'segments': {0: held}}
    with mock.patch.object(lib, '_layers', side_effect=AssertionError):
      got = lib.prepare(
        model, {'params': params, 'buffers': buffers}, donate=True
      )
    self.assertEqual(
      set(map(id, jax.tree.leaves(got))),
      set(map(id, jax.tree.leaves(variables))),
    )

  def test_an_array_that_is_there_twice_is_read_twice(self):
    model, host = case('v3 bfloat16')
    variables = on_device(host)
    (segment,) = variables['params']['segments'][1].values()
    norms = [k for k in segment if 'norm' in k]
    segment[norms[1]]['scale'] = segment[norms[0]]['scale']
    want = lib.prepare(model, jax.tree.map(np.asarray, variables))
    try:
      got = lib.prepare(model, variables, donate=True)
    except RuntimeError as error:  # jax's, of an array that is gone
      self.fail(str(error))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_array_equal(np.asarray(one), np.asarray(other))

  def test_a_pattern_that_comes_once_is_not_copied(self):
    config = ds.changed(
      tiny.config('v3'), {'layout': ((('dense', 'moe', 'moe'), 1),)}
    )
    model = ds.build(config)
    variables = jax.jit(model.init)(jax.random.key(0))
    got = lib.prepare(model, variables)
    held = set(map(id, jax.tree.leaves(variables)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
      self.assertIn(id(leaf), held, jax.tree_util.keystr(path))

  def test_arrays_of_the_host_are_taken(self):
    model, host = case('v3')
    got = lib.prepare(model, host, donate=True)
    for leaf in jax.tree.leaves(got):
      self.assertIsInstance(leaf, jax.Array)


class EngineTest(absltest.TestCase):
  def answer(self, engine):
    request = Request((1, 2, 3), 4, sampling=Sampling(temperature=0))
    [[answer]] = engine.run([request])
    return answer.tokens

  def test_an_engine_holds_one_copy_of_what_it_is_given(self):
    model, host = case('v3')
    want = self.answer(Engine(model, on_device(host), SMALL))
    before = live()
    engine = Engine(model, on_device(host), SMALL, donate=True)
    held = live() - before - engine.stats['cache_bytes']
    self.assertLess(held, 1.01 * size(host))
    self.assertEqual(self.answer(engine), want)

  def test_new_weights_take_the_place_of_the_old(self):
    model, host = case('v3')
    engine = Engine(model, on_device(host), SMALL, donate=True)
    want = self.answer(engine)
    before, seen, real = live(), [], lib._layers

    def watched(*args):
      made = real(*args)
      seen.append(live() - before)
      return made

    with mock.patch.object(lib, '_layers', watched):
      engine.load(on_device(host), donate=True)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(host))
    self.assertLessEqual(max(seen), largest)
    self.assertEqual(self.answer(engine), want)

  def test_wrong_weights_leave_the_old_ones(self):
    model, host = case('v3')
    engine = Engine(model, on_device(host), SMALL, donate=True)
    want = self.answer(engine)
    variables = on_device(host)
    del variables['params']['embed']
    with self.assertRaises(ds.InputError):
      engine.load(variables, donate=True)
    self.assertEqual(self.answer(engine), want)


if __name__ == '__main__':
  absltest.main()
