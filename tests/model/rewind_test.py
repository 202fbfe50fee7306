"""Wrong guesses in a cache leave no trace once right tokens overwrite them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention import ring
from deepseek_jax.model.attention.csa import CSACache, CSAConfig
from deepseek_jax.model.attention.dsa import SparseLatent
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.nsa import NSACache
from deepseek_jax.model.attention.shared_kv import SharedKVCache
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.transformer_config import Kind
from tests import tiny
from tests.model import composition_test

GUESSES, WIDTH, T = 3, 4, 33
ENGRAM = EngramConfig(base=11, longest=3, heads=2, dim=4, conv=2)
WINDOW = dataclasses.replace(
  composition_test.ATTENTIONS['csa'], compress='none', window=5
)
ATTENTIONS = {
  **{k: composition_test.ATTENTIONS[k] for k in ('gqa', 'mla', 'dsa', 'nsa')},
  'in_blocks': dataclasses.replace(
    composition_test.ATTENTIONS['dsa'],
    indexer=IndexerConfig(2, 6, blocks=IndexBlocksConfig(4, 2)),
  ),
  'window': WINDOW,
  'csa': dataclasses.replace(
    WINDOW, compress='csa', csa=CSAConfig(4, 3, index_heads=2, index_dim=4)
  ),
  'hca': dataclasses.replace(WINDOW, compress='hca', hca=HCAConfig(ratio=6)),
}
RINGS = ('window', 'csa', 'hca', 'engram')
FAMILIES = (*ATTENTIONS, 'engram')


@functools.cache
def model(name):
  """Two layers of a family; with Engrams beside its attention, 'engram'."""
  engram = name == 'engram'
  return ds.build(
    ds.TransformerConfig(
      tiny.VOCAB,
      tiny.DIM,
      ((('one',), 2),),
      ATTENTIONS['gqa' if engram else name],
      FFNConfig(12),
      kinds={'one': Kind('ffn', engram=engram)},
      residual=HyperConnectionsConfig(streams=2, iterations=2),
      engram=ENGRAM if engram else None,
    )
  )


@functools.cache
def variables(name):
  made = jax.jit(model(name).init)(jax.random.key(0))
  return {**made, 'params': tiny.fill(made['params'])}


@functools.cache
def step(name):
  return jax.jit(model(name).apply)


def visible(cache, length, cfg):
  """Returns what a token at position `length` may read, of the first row."""
  out = []

  def slots(a, count):
    out.append(np.asarray(a[:, 0, : max(0, count)]))

  def last(a, window):
    start = jnp.full(a.shape[0], length)
    seen = np.asarray(ring.before(start, window) >= 0)
    rows = np.asarray(ring.unroll(a[:, 0], start, window))
    out.append(
      np.where(seen.reshape(*seen.shape, *(1,) * (a.ndim - 3)), rows, 0)
    )

  def entries(a, make):
    slots(a.entries, length // make.ratio)
    last(a.kv, make.reach)
    last(a.gate, make.reach)

  def attention(a):
    if isinstance(a, SharedKVCache):
      last(a.window, cfg.window)
      each = a.far if isinstance(a.far, CSACache) else (a.far,)
      for far in each if a.far is not None else ():
        entries(far, cfg.compressor())
    elif isinstance(a, NSACache):
      blocks = (length - cfg.block) // cfg.stride + 1
      for part, count in zip(a, (length, length, blocks, blocks)):
        slots(part, count)
    elif isinstance(a, SparseLatent) and a.means is not None:
      blocks = length // cfg.indexer.blocks.size
      for part, count in zip(a, (length, length, length, blocks)):
        slots(part, count)
    else:
      for part in jax.tree.leaves(a):
        slots(part, length)

  for block in cache.layers[0]:
    if cache.recent is not None:
      block, convolved = block
      last(convolved, ENGRAM.reach + 1)
      last(cache.recent[None], ENGRAM.longest)
    attention(block)
  return out


@functools.cache
def read(name, guesses, spare, *, how='positions'):
  """(logits of all tokens, what is visible in the end) of two ragged rows.

  Args:
    guesses: whether wrong tokens are written before every call.
    spare: slots of rings.
    how: the caller tells where a row goes on: 'positions' or 'length', or
      'before' where it gives the last tokens as well.
  """
  net, run, rows = model(name), step(name), 2
  tokens = tiny.tokens(rows, T)
  rng = np.random.default_rng(1)
  wrong = np.random.default_rng(2)
  cache = net.init_cache(rows, T, spare=spare).rewound(np.zeros(rows))
  if how == 'before':
    cache = dataclasses.replace(cache, recent=None)
  done = np.zeros(rows, int)
  logits = np.zeros((rows, T, tiny.VOCAB), np.float32)

  def call(new, count, cache):
    valid = (np.arange(WIDTH) < count[:, None]).astype(np.int32)
    more = {}
    if how == 'length':
      cache = cache.rewound(done)
    else:
      more['positions'] = done[:, None] + np.arange(WIDTH)
    if how == 'before':
      at = done[:, None] + np.arange(1 - ENGRAM.longest, 0)
      held = tokens[np.arange(rows)[:, None], np.maximum(at, 0)]
      more['before'] = np.where(at >= 0, held, -7)
    return run(variables(name), new, cache=cache, segment_ids=valid, **more)

  while (done < T).any():
    if guesses:
      new = wrong.integers(0, tiny.VOCAB, (rows, WIDTH)).astype(np.int32)
      count = wrong.choice([0, 1, GUESSES, GUESSES], rows)
      cache = call(new, np.minimum(count, T - done), cache).cache
    count = np.minimum(rng.integers(0, WIDTH + 1, rows), T - done)
    at = np.minimum(done[:, None] + np.arange(WIDTH), T - 1)
    out = call(tokens[np.arange(rows)[:, None], at], count, cache)
    for b in range(rows):
      logits[b, done[b] : done[b] + count[b]] = out.logits[b, : count[b]]
    done, cache = done + count, out.cache
    if how != 'before':
      moved = count > 0
      np.testing.assert_array_equal(cache.length[moved], done[moved])
  return logits, cache


class RewindTest(parameterized.TestCase):
  def equal(self, name, got, want):
    cfg = model(name).config.attention
    np.testing.assert_array_equal(got[0], want[0])
    pairs = zip(*(visible(c, T, cfg) for _, c in (got, want)), strict=True)
    for left, right in pairs:
      self.assertGreater(np.abs(right).max(), 0)
      np.testing.assert_array_equal(left, right)

  @parameterized.parameters(*FAMILIES)
  def test_guesses_leave_no_trace(self, name):
    want = read(name, False, 0)
    self.equal(name, read(name, True, GUESSES), want)
    # Spare slots by themselves change nothing.
    self.equal(name, read(name, False, GUESSES), want)
    whole = step(name)(variables(name), tiny.tokens(2, T)).logits
    self.assertLess(tiny.relative(want[0], whole), 2e-5)

  @parameterized.parameters(*FAMILIES)
  def test_rings_without_spare_slots_lose_tokens(self, name):
    want, got = read(name, False, 0)[0], read(name, True, 0)[0]
    self.assertEqual(np.abs(got - want).max() > 1e-4, name in RINGS)

  @parameterized.parameters('mla', 'csa', 'engram')
  def test_rows_go_on_after_a_given_length(self, name):
    want = read(name, False, 0)
    self.equal(name, read(name, True, GUESSES, how='length'), want)

  def test_the_last_tokens_may_be_given(self):
    want = read('engram', False, 0)[0]
    got, cache = read('engram', True, GUESSES, how='before')
    np.testing.assert_array_equal(got, want)
    self.assertIsNone(cache.recent)


class GivenTest(parameterized.TestCase):
  def cache(self, name='engram', **fields):
    cache = model(name).init_cache(2, 8).rewound(np.array([3, 5]))
    return dataclasses.replace(cache, **fields)

  def refused(self, message, *, name='engram', **given):
    given.setdefault('cache', self.cache(name))
    with self.assertRaisesRegex(ds.InputError, message):
      model(name).apply(variables(name), tiny.tokens(2, 2), **given)

  def test_positions_outside_the_cache_are_refused(self):
    at = np.array([[3, 4], [7, 8]])
    self.refused('positions: 8 is outside the cache of 8 slots', positions=at)
    at = np.array([[3, 4], [-1, 0]])
    self.refused('positions: -1 is outside', positions=at)

  def test_padding_may_stand_anywhere(self):
    at, real = np.array([[3, 4], [7, 8]]), np.array([[1, 1], [1, 0]])
    out = model('gqa').apply(
      variables('gqa'),
      tiny.tokens(2, 2),
      positions=at,
      segment_ids=real,
      cache=self.cache('gqa'),
    )
    self.assertEqual(out.cache.length.tolist(), [5, 8])

  def test_the_last_tokens_are_needed_once_and_as_many_as_there_are(self):
    last = np.zeros((2, 2), np.int32)
    self.refused('keeps no last tokens', cache=self.cache(recent=None))
    self.refused(r'before: int32\[2, 1\]; must be', before=last[:, :1])
    self.refused('before: float64', before=last * 1.0)
    self.refused('no memory reads them', name='gqa', before=last)
    self.refused('there is no cache', cache=None, before=last)

  def test_spare_slots_are_counted_from_0(self):
    with self.assertRaisesRegex(ds.InputError, 'spare = -1: must be'):
      model('gqa').init_cache(2, 8, spare=-1)

  def test_an_attention_of_ones_own_says_that_it_cannot_be_rewound(self):
    class Own(GQAConfig):
      def cache(self, batch, slots, dtype):
        return super().cache(batch, slots, dtype)

    own = dataclasses.replace(model('gqa').config, attention=Own(4, 2, 6))
    ds.build(own).init_cache(2, 8)
    with self.assertRaisesRegex(ds.InputError, 'spare = 2: Own.cache takes no'):
      ds.build(own).init_cache(2, 8, spare=2)


if __name__ == '__main__':
  absltest.main()
