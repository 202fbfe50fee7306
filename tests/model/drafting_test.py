"""Drafting token by token predicts what the training-time blocks predict."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from tests import fake_devices, tiny
from tests.model.drafting_worker import (
  T,
  drafted,
  drafting,
  model,
  taught,
  tokens,
  variables,
)

NAMES = ('v3', 'v32', 'v4')


class DraftTest(parameterized.TestCase):
  @parameterized.product(name=NAMES, chunks=((1,), (3, 1)))
  def test_drafts_of_right_tokens_equal_training(self, name, chunks):
    self.check(name, chunks)

  @parameterized.product(name=NAMES, chunks=((3,), (T,)))
  @pytest.mark.slow
  def test_drafts_of_other_chunks_equal_training(self, name, chunks):
    self.check(name, chunks)

  def check(self, name, chunks):
    want, state = taught(name)
    got, _ = drafted(name, chunks, state)
    self.assertLess(tiny.relative(got, np.asarray(want[0])[:, : T - 1]), 1e-5)

  def test_a_second_depth_goes_on_from_the_first(self):
    name = 'dense_mtp'
    want, state = taught(name)
    _, first = drafted(name, (3,), state)
    got, _ = drafted(name, (3,), first, depth=2)
    self.assertLess(tiny.relative(got, np.asarray(want[1])[:, : T - 2]), 1e-5)

  @parameterized.parameters('v3', 'v4')
  def test_what_depth_1_takes_comes_out_of_a_cached_call_too(self, name):
    _, want = taught(name)
    net = model(name)
    run = jax.jit(functools.partial(net.apply, mtp_state=True))
    cache, got = net.init_cache(2, T).rewound([0, 0]), []
    for a, b in ((0, 7), (7, 14)):
      out = run(variables(name), tokens()[:, a:b], cache=cache)
      got.append(out.aux['mtp_state'])
      cache = out.cache
    self.assertLess(tiny.relative(np.concatenate(got, 1), want), 1e-5)

  @parameterized.parameters('v3', 'v4')
  def test_the_last_block_is_repeated_with_its_own_state(self, name):
    """A drafted state takes the place of the next token's, one place on."""
    _, state = taught(name)
    net, run = model(name), drafting(name, None)
    at = np.broadcast_to(np.arange(4), (2, 4)).astype(np.int32)
    empty = net.init_mtp_cache(2, T)

    def call(state, cache, a, b, **depth):
      given = state, tokens()[:, a + 1 : b + 1], cache, at[:, a:b]
      return run(variables(name), *given, np.ones((2, b - a), bool), **depth)

    first = call(state[:, :3], empty, 0, 3, depth=1)
    second = call(first.state[:, 2:], first.cache, 3, 4, depth=2)
    # The same as the states that were fed give in one call.
    fed = np.concatenate([state[:, :3], first.state[:, 2:]], axis=1)
    want = call(fed, empty, 0, 4, depth=1)
    self.assertLess(tiny.relative(second.logits, want.logits[:, 3:]), 1e-5)
    self.assertEqual(second.cache.length.tolist(), [4, 4])

  @parameterized.parameters('v3', 'v4')
  def test_wrong_drafts_leave_no_trace(self, name):
    """Before every right one, in a cache with two spare slots."""
    _, state = taught(name)
    net, rng = model(name), np.random.default_rng(0)
    run = functools.partial(drafting(name, None), variables(name))
    clean = guessed = net.init_mtp_cache(2, T, spare=2)
    for t in range(T - 1):
      at = np.broadcast_to(t + np.arange(3), (2, 3)).astype(np.int32)
      kept, one = np.minimum(at[0], T - 2), np.arange(3) < np.ones((2, 1))
      given, new = state[:, kept], tokens()[:, kept + 1]
      want = run(given, new, clean, at, one, depth=1)
      wrong = rng.integers(0, tiny.VOCAB, (2, 3)).astype(np.int32)
      # Three guesses, of which the first is overwritten at once.
      guessed = run(-given, wrong, guessed, at, at < T, depth=1).cache
      got = run(given, new, guessed, at, one, depth=1)
      np.testing.assert_array_equal(got.logits[:, 0], want.logits[:, 0])
      clean, guessed = want.cache, got.cache

  def test_two_devices_draft_as_one(self):
    self.check_devices('v3')

  @pytest.mark.slow
  def test_two_devices_draft_as_one_by_streams(self):
    self.check_devices('v4')

  def check_devices(self, name):
    found = fake_devices.run('tests.model.drafting_worker', name, devices=2)
    for case, error in found.items():
      self.assertLess(error, 1e-5, case)


class GivenTest(parameterized.TestCase):
  def draft(self, name='v3', state=None, at=0, **more):
    net = model(name)
    if state is None:
      state = np.zeros((2, 1, tiny.DIM), np.float32)
    return net.draft(
      variables(name),
      state,
      tokens()[:, :1],
      net.init_mtp_cache(2, T),
      np.full((2, 1), at, np.int32),
      **more,
    )

  def test_what_cannot_be_drafted_from_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'depth = 0: must be at least'):
      self.draft(depth=0)
    with self.assertRaisesRegex(ds.InputError, r'state: .*\[2, 1, 16\]'):
      self.draft(state=np.zeros((2, 1, 3), np.float32))
    with self.assertRaisesRegex(ds.InputError, 'positions: 14 is outside'):
      self.draft(at=T)
    with self.assertRaisesRegex(ds.InputError, r'mtp\.depth = 0: this model'):
      tiny.model('gqa').init_mtp_cache(2, T)

  def test_the_cache_is_laid_out_as_that_of_layers(self):
    net = tiny.model('mixed')
    cache = jax.eval_shape(lambda: net.init_mtp_cache(2, 9))
    layers = jax.eval_shape(lambda: net.init_cache(2, 9)).layers
    self.assertLen(cache.layers, 2)
    for depth in cache.layers:
      for mine, theirs in zip(depth[0], layers[0][0]):
        self.assertEqual(mine.shape, (1, *theirs.shape[1:]))
    # What a caller does not ask for is not there.
    self.assertLen(layers, 1)


if __name__ == '__main__':
  absltest.main()
