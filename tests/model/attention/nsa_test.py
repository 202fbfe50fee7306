"""Native sparse attention against float64 loops, and its properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention import document_blocks, nsa_branches
from deepseek_jax.model.attention.nsa import NSA, NSAConfig
from deepseek_jax.model.attention.rope import RopeConfig
from deepseek_jax.model.context import Context
from tests import reference, sparse_reference, tiny

DIM, T = 12, 29
CFG = NSAConfig(
  heads=4,
  kv_heads=2,
  qk_dim=6,
  v_dim=5,
  block=4,
  stride=2,
  hidden=7,
  select_block=4,
  select=3,
  initial=1,
  local=1,
  window=5,
  rope=RopeConfig(theta=100.0, interleaved=False),
  queries=8,
)
WIDER = dataclasses.replace(CFG, select_block=6, local=2, select=4, block=6)


@functools.cache
def drawn():
  """Weights of each configuration, and inputs."""
  out = {}
  for cfg in (CFG, WIDER):
    module = NSA(cfg, DIM, std=1.0, rngs=nnx.Rngs(0))
    values = tiny.fill(nnx.to_pure_dict(nnx.state(module)))
    out[cfg] = jax.tree.map(np.asarray, values)
  x = np.random.default_rng(5).normal(size=(2, T, DIM)).astype(np.float32)
  return out, x


def module(cfg, values):
  made = NSA(cfg, DIM, std=1.0, rngs=nnx.Rngs(0))
  return nnx.merge(nnx.split(made)[0], values)


@functools.cache
def packed():
  batch = tiny.documents(2, T, seed=3, padding=3)
  positions, segments = batch['positions'], batch['segments']
  return Context(positions * 0, positions, segments)


def context(start=0, length=T, segments=None):
  positions = np.broadcast_to(np.arange(start, start + length), (2, length))
  return Context(positions * 0, positions, segments, fresh=start == 0)


@functools.cache
def forward(cfg):
  return jax.jit(lambda v, x: module(cfg, v)(x, context())[0])


def by_hand(cfg, values, x, ctx, chosen=(None, None)):
  out = [
    sparse_reference.nsa(values, cfg, x[b], ctx.positions[b], row, chosen[b])
    for b, row in enumerate(ctx.segments)
  ]
  return np.stack([y for y, _ in out]), [picked for _, picked in out]


class Float64Test(parameterized.TestCase):
  @parameterized.named_parameters(('narrow', CFG), ('wide', WIDER))
  def test_equals_loops_in_packed_documents(self, cfg):
    weights, x = drawn()
    ctx = packed()
    y = jax.jit(lambda v, x: module(cfg, v)(x, ctx)[0])(weights[cfg], x)
    values = reference.to_float64(weights[cfg])
    want, picked = by_hand(cfg, values, np.float64(x), ctx)
    self.assertLess(tiny.relative(y, want), 5e-6)
    if cfg is CFG:  # groups choose for themselves
      self.assertTrue(any(a != b for row in picked for a, b in row))

  def test_gradient_equals_finite_differences(self):
    weights, x = drawn()
    values, ctx = weights[CFG], packed()
    probe = np.random.default_rng(2).normal(size=x.shape)
    total = lambda v, x: (module(CFG, v)(x, ctx)[0] * probe).sum()
    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(values, x)
    at, x64 = reference.to_float64(values), np.float64(x)
    chosen = by_hand(CFG, at, x64, ctx)[1]  # held: choosing has no gradient

    def moved(h, d, dx):
      there = jax.tree.map(lambda a, b: a + h * b, at, d)
      return (by_hand(CFG, there, x64 + h * dx, ctx, chosen)[0] * probe).sum()

    norm = np.sqrt(
      sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads))
    )
    for seed in range(2):
      d = jax.tree.map(np.float64, tiny.fill(values, seed + 7))
      dx = np.random.default_rng(seed).normal(size=x.shape)
      slope = (moved(1e-6, d, dx) - moved(-1e-6, d, dx)) / 2e-6
      leaves = zip(jax.tree.leaves(grads), jax.tree.leaves((d, dx)))
      got = sum((np.float64(g) * b).sum() for g, b in leaves)
      self.assertAlmostEqual(got / norm, slope / norm, delta=2e-5)
    for g in jax.tree.leaves(grads):
      self.assertGreater(float(np.abs(g).max()), 1e-4)


class CausalityTest(absltest.TestCase):
  def test_a_token_changes_nothing_before_it(self):
    weights, x = drawn()
    before = np.asarray(forward(CFG)(weights[CFG], x))
    for t in range(T):
      other = x.copy()
      other[:, t] += 1
      after = np.asarray(forward(CFG)(weights[CFG], other))
      np.testing.assert_array_equal(after[:, :t], before[:, :t])
      self.assertGreater(np.abs(after[:, t] - before[:, t]).max(), 1e-3)

  def test_documents_read_as_if_they_were_alone(self):
    weights, x = drawn()
    cut = 13  # no multiple of a block
    segments = np.broadcast_to(np.where(np.arange(T) < cut, 1, 2), (2, T))
    positions = np.broadcast_to(
      np.where(np.arange(T) < cut, np.arange(T), np.arange(T) - cut), (2, T)
    )
    ctx = Context(segments, positions, segments)
    both = jax.jit(lambda v, x: module(CFG, v)(x, ctx)[0])(weights[CFG], x)
    moved = np.concatenate([x[:, cut:], x[:, :cut]], axis=1)
    alone = forward(CFG)(weights[CFG], moved)
    np.testing.assert_allclose(
      both[:, cut:], alone[:, : T - cut], atol=1e-5, rtol=1e-5
    )


class DecodeTest(parameterized.TestCase):
  @parameterized.parameters(1, 3, 5, T)
  def test_chunks_and_single_tokens_equal_forward(self, chunk):
    """For several windows and blocks, across all of their borders."""
    weights, x = drawn()
    want = forward(CFG)(weights[CFG], x)

    @jax.jit
    def step(v, x, past, start):
      at = start + jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
      ctx = Context(at, at, None, fresh=False)
      return module(CFG, v)(x, ctx, past)[:2]

    past = CFG.cache(2, T + 3, jnp.float32)
    past = jax.tree.map(lambda a: a + 7, past)  # garbage where nothing is yet
    for at in range(0, T, chunk):
      y, past = step(weights[CFG], x[:, at : at + chunk], past, at)
      np.testing.assert_allclose(
        y, want[:, at : at + chunk], atol=2e-5, rtol=1e-5
      )

  @parameterized.parameters(False, True)
  def test_ragged_rows_equal_forward(self, padding_first):
    weights, x = drawn()
    want = forward(CFG)(weights[CFG], x)
    values, done = weights[CFG], np.array([0, 0])
    past = CFG.cache(2, T, jnp.float32)

    @jax.jit
    def step(x, valid, at, past):
      ctx = Context(valid, at, valid, fresh=False)
      return module(CFG, values)(x, ctx, past)[:2]

    for news in ((9, 5), (3, 9), (6, 7)):
      chunk, valid = np.zeros((2, 9, DIM), np.float32), np.zeros((2, 9), int)
      begin = 9 - np.array(news) if padding_first else np.zeros(2, int)
      for b, new in enumerate(news):
        own = slice(begin[b], begin[b] + new)
        chunk[b, own] = x[b, done[b] : done[b] + new]
        valid[b, own] = 1
      y, past = step(chunk, valid, (done - begin)[:, None] + np.arange(9), past)
      for b, new in enumerate(news):
        np.testing.assert_allclose(
          y[b, begin[b] :][:new],
          want[b, done[b] : done[b] + new],
          atol=2e-5,
          rtol=1e-5,
        )
      done = done + news


class PiecesTest(parameterized.TestCase):
  def test_published_overlaps(self):
    """Blocks of 64, entries of 32 every 16: 1 2 2 2 1."""
    got = nsa_branches.overlaps(NSAConfig(2, 1, 2, 2))
    np.testing.assert_array_equal(got, [1, 2, 2, 2, 1])
    same = dataclasses.replace(CFG, block=4, select_block=4, stride=4)
    np.testing.assert_array_equal(nsa_branches.overlaps(same), [1])

  def test_an_entry_is_seen_once_it_is_complete(self):
    first = jnp.zeros((1, 12), int)
    starts = lambda first: document_blocks.block_starts(first, 4, 2)[0]
    got = starts(first)
    np.testing.assert_array_equal(got, [0, 2, 4, 6, 8, -1])
    split = starts(jnp.array([[0] * 5 + [5] * 7]))
    np.testing.assert_array_equal(split, [0, 5, 7, -1, -1, -1])

  def test_without_a_complete_entry_that_branch_is_0(self):
    weights, x = drawn()
    values = dict(weights[CFG])
    values['compress_v'] = jax.tree.map(lambda a: a + 100, values['compress_v'])
    a = forward(CFG)(weights[CFG], x)
    b = forward(CFG)(values, x)
    np.testing.assert_array_equal(a[:, :3], b[:, :3])
    self.assertGreater(float(np.abs(a[:, 3] - b[:, 3]).max()), 1)

  def test_decoding_reads_the_published_number_of_tokens(self):
    """floor(s/d) + n l' + w: 2048, 2560, 3584 and 5632 of 8k to 64k."""
    cfg = NSAConfig(64, 4, 192, 128)
    for tokens, want in ((8, 2048), (16, 2560), (32, 3584), (64, 5632)):
      read = tokens * 1024 // cfg.stride
      read += cfg.select * cfg.select_block + cfg.window
      self.assertEqual(read, want)

  def test_no_array_grows_as_T_times_T_of_tokens(self):
    """Chosen rows are select * select_block + window, whatever T is."""
    x = jax.ShapeDtypeStruct((1, 512, DIM), jnp.float32)
    at = np.arange(512)[None]
    jaxpr = jax.make_jaxpr(
      lambda v, x: module(CFG, v)(x, Context(at, at, None))[0]
    )(drawn()[0][CFG], x)
    # A row of each input times the gathered rows, and the entries' scores.
    gathered = CFG.select * CFG.select_block + CFG.window
    block = CFG.queries * max(gathered * CFG.kv_heads * CFG.qk_dim, 256 * 12)
    tokens = 512 * max(3 * CFG.kv_heads * CFG.qk_dim, CFG.heads * DIM)
    self.assertLessEqual(max(_sizes(jaxpr.jaxpr)), max(block, tokens))


def _sizes(jaxpr):
  for eqn in jaxpr.eqns:
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _sizes(inner)
    for out in eqn.outvars:
      yield int(np.prod(out.aval.shape))


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'heads': 0}, 'heads = 0: must be at least 1'),
    ({'kv_heads': 3}, 'kv_heads = 3: must divide heads = 4'),
    ({'qk_dim': 5}, 'qk_dim = 5: must be even'),
    ({'stride': 3}, 'stride = 3: must divide block = 4'),
    ({'block': 8}, 'block = 8: must be at most select_block = 4'),
    ({'local': 3}, 'select = 3: must be at least initial . local = 4'),
  )
  def test_bad_sizes_are_refused(self, change, message):
    with self.assertRaisesRegex(ds.InputError, message):
      dataclasses.replace(CFG, **change)

  def test_is_chosen_by_data(self):
    cfg = dataclasses.replace(tiny.config('gqa'), attention=CFG)
    plain = ds.to_dict(cfg)
    self.assertEqual(plain['attention']['kind'], 'nsa')
    self.assertEqual(ds.from_dict(ds.TransformerConfig, plain), cfg)


if __name__ == '__main__':
  absltest.main()
