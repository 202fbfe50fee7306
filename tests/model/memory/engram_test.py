"""The memory against float64, its hash on the device against the host's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.data import ngrams
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory import ngram_hash
from deepseek_jax.model.memory.engram import Engram, EngramConfig
from deepseek_jax.model.transformer_config import Kind
from deepseek_jax.parallel import sharding
from deepseek_jax.train import muon
from deepseek_jax.train import optimizer as optim
from tests import reference, tiny

T, DIM = 24, 16
MEMORY = EngramConfig(base=11, longest=3, heads=2, dim=6, conv=3)
KINDS = {'dense': Kind('ffn'), 'memory': Kind('ffn', engram=True)}


@functools.cache
def config(streams=1):
  plain = ds.TransformerConfig(
    tiny.VOCAB,
    DIM,
    ((('dense', 'memory'), 2), (('memory',), 1)),
    tiny.ATTENTIONS['gqa'],
    FFNConfig(12),
    kinds=KINDS,
    engram=MEMORY,
  )
  if streams == 1:
    return plain
  residual = HyperConnectionsConfig(streams=streams, iterations=3)
  return dataclasses.replace(
    plain, residual=residual, layout=((('memory', 'dense'), 1),)
  )


@functools.cache
def model(streams=1):
  return ds.build(config(streams))


@functools.cache
def initial(streams=1):
  return jax.jit(model(streams).init)(jax.random.key(0))


@functools.cache
def variables(streams=1):
  """Random weights; the hash and the numbers of layers as they are made."""
  made = initial(streams)
  return {**made, 'params': tiny.fill(made['params'])}


@functools.cache
def jitted(streams=1):
  return jax.jit(model(streams).apply)


def tokens():
  return jnp.asarray(tiny.tokens(2, T))


def whole():
  """Positions and segments of one document a row: one compilation for all."""
  at = jnp.broadcast_to(jnp.arange(T), (2, T))
  return {'positions': at, 'segment_ids': jnp.ones_like(at)}


class HashTest(parameterized.TestCase):
  @parameterized.parameters(3, 1000, 2**20, 2**31 - 500)
  def test_rows_equal_the_hosts_to_the_bit(self, base):
    classes = 99092
    sizes = np.array([[[base + 1, base + 2], [base, base + 3]]] * 2)
    how = ngrams.Hash(ngrams.multipliers((0, 5), 3, classes, 1), sizes)
    window = np.random.default_rng(0).integers(0, classes, (2, 40, 3))
    window[0, 0] = classes - 1
    halves = [how.multipliers >> 32, how.multipliers & 0xFFFFFFFF]
    got = ngram_hash.rows_on_device(
      jnp.asarray(window, jnp.int32),
      jnp.asarray(np.stack(halves, axis=-1).astype(np.uint32)),
      jnp.asarray(sizes, jnp.int32),
      int(sizes.max()).bit_length(),
    )
    # Tables this big have more rows together than 32 bits count.
    want = ngrams.rows(window, how).astype(np.uint32)
    np.testing.assert_array_equal(np.asarray(got).astype(np.uint32), want)

  def test_the_model_reads_the_same_rows_hashed_here_or_there(self):
    batch = tiny.documents(2, T, padding=3)
    arrays = {
      'positions': jnp.asarray(batch['positions']),
      'segment_ids': jnp.asarray(batch['segments']),
    }
    host = ngram_hash.host_hash(variables()['buffers'])
    rows = host(*(batch[k] for k in ('tokens', 'segments', 'positions')))
    self.assertEqual(rows.shape, (2, T, 3, 4))
    here = jitted()(variables(), batch['tokens'], **arrays)
    there = jitted()(variables(), batch['tokens'], ngrams=rows, **arrays)
    np.testing.assert_array_equal(here.logits, there.logits)
    other = jitted()(variables(), batch['tokens'], ngrams=rows * 0, **arrays)
    self.assertGreater(float(jnp.abs(other.logits - here.logits).max()), 0.01)

  def test_layers_are_numbered_by_their_place_and_hash_apart(self):
    self.assertEqual(config().engram_layers(), (1, 3, 4))
    buffers = variables()['buffers']
    numbers = [
      buffers['segments'][i][j]['engram']['number'] for i, j in ((0, 1), (1, 0))
    ]
    self.assertEqual(np.concatenate(numbers).tolist(), [0, 1, 2])
    host = ngram_hash.host_hash(buffers)
    np.testing.assert_array_equal(
      host.how.multipliers, ngrams.multipliers((1, 3, 4), 3, tiny.VOCAB, 0)
    )
    np.testing.assert_array_equal(host.how.primes, ngrams.primes(11, 3, 2, 2))


def by_hand(p, cfg, x, window_rows, segments):
  """One sequence x [T n D] with rows [T K] in float64."""
  n, D = x.shape[1:]
  scale = lambda name: p[name].reshape(n, D)
  value, gated = [], np.zeros(x.shape)
  for t in range(len(x)):
    memory = np.concatenate([p['table'][r] for r in window_rows[t]])
    value.append(memory @ p['value'])
    for j in range(n):
      key = reference.rms(
        memory @ p['key'][:, j], scale('key_norm')[j], cfg.norm_eps
      )
      query = reference.rms(x[t, j], scale('query_norm')[j], cfg.norm_eps)
      agree = key @ query / np.sqrt(D)
      root = np.sqrt(max(abs(agree), 1e-6))
      gate = 1 / (1 + np.exp(-np.sign(agree) * root))
      gated[t, j] = gate * value[t]
  out = x + gated
  normed = reference.rms(gated, scale('conv_norm'), cfg.norm_eps)
  for t in range(len(x)):
    mixed = np.zeros((n, D))
    for k in range(cfg.conv):
      s = t - k * cfg.longest
      if s >= 0 and segments[s] == segments[t]:
        mixed += p['conv'][k] * normed[s]
    out[t] += reference.silu(mixed)
  return out


class ModuleTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_equals_float64_in_documents(self, streams):
    module = Engram(
      MEMORY, DIM, streams=streams, rows=128, std=1.0, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(module)
    weights = nnx.to_pure_dict(state)
    number = weights.pop('number')
    weights = tiny.fill(weights)
    p = reference.to_float64(weights)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, T, streams, DIM)).astype(np.float32)
    rows = rng.integers(0, 128, (2, T, 3, 4)).astype(np.int32)
    batch = tiny.documents(2, T)

    @jax.jit
    def run(weights, x):
      ctx = Context(
        None,
        jnp.asarray(batch['positions']),
        jnp.asarray(batch['segments']),
        rows=jnp.asarray(rows),
      )
      given = {**weights, 'number': number + 2}
      stream = x if streams > 1 else x[:, :, 0]
      return nnx.merge(graphdef, given)(stream, ctx)[0].reshape(x.shape)

    got = run(weights, x)
    for b in range(2):
      want = by_hand(
        p, MEMORY, np.float64(x[b]), rows[b, :, 2], batch['segments'][b]
      )
      # float32: sums of up to 16 products, a root of their sum.
      self.assertLess(tiny.relative(got[b], want), 1e-5)

  def test_gates_and_their_gradients_are_finite_at_0(self):
    cfg = dataclasses.replace(MEMORY, conv=0)
    module = Engram(cfg, DIM, streams=1, rows=128, std=1.0, rngs=nnx.Rngs(0))
    memory = jnp.ones((1, 2, cfg.width))
    gate = lambda x: module.gates(x, memory).sum()
    zero = jnp.zeros((1, 2, 1, DIM))
    value, grad = jax.value_and_grad(gate)(zero)
    self.assertAlmostEqual(float(value), 1.0, places=3)  # two gates of a half
    self.assertTrue(np.isfinite(grad).all())

  def test_the_convolution_starts_as_nothing(self):
    memory = initial()['params']['segments'][0][1]['engram']
    np.testing.assert_array_equal(memory['conv'], 0)
    self.assertGreater(float(memory['table'].std()), 0)


class ModelTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_a_token_changes_no_logit_before_it(self, streams):
    t = 11
    before = jitted(streams)(variables(streams), tokens(), **whole()).logits
    changed = tokens().at[:, t].set((tokens()[:, t] + 7) % tiny.VOCAB)
    after = jitted(streams)(variables(streams), changed, **whole()).logits
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    self.assertGreater(float(jnp.abs(before - after)[:, t].max()), 1e-3)

  def test_a_memory_alone_reaches_its_n_gram_and_its_taps(self):
    # Attention switched off: what is left of a token's influence is Engram's.
    params = jax.tree.map(lambda a: a, variables()['params'])
    for i, j in ((0, 0), (0, 1), (1, 0)):
      attention = params['segments'][i][j]['attention']
      attention['out'] = 0 * attention['out']
    given = {**variables(), 'params': params}
    first = params['segments'][0][0]
    self.assertEqual(float(jnp.abs(first['attention']['out']).max()), 0)
    t = 3
    before = jitted()(given, tokens(), **whole()).logits
    changed = tokens().at[:, t].set((tokens()[:, t] + 7) % tiny.VOCAB)
    after = jitted()(given, changed, **whole()).logits
    far = np.flatnonzero(np.abs(before - after).max(axis=(0, 2)) > 1e-6)
    # Three layers: N-gram 3 and taps at 0, 3, 6 reach 2 + 6 tokens at most,
    # and each later convolution 6 more.
    self.assertEqual(far[0], t)
    self.assertLessEqual(far[-1], t + 2 + 3 * 6)
    self.assertIn(t + 2, far)
    self.assertIn(t + 8, far)

  def test_documents_do_not_leak_into_each_other(self):
    rows, cut = np.asarray(tokens()), 10
    segments = np.ones_like(rows)
    segments[:, cut:] = 2
    at = np.concatenate([np.arange(cut), np.arange(T - cut)])
    arrays = {
      'positions': np.broadcast_to(at, rows.shape),
      'segment_ids': segments,
    }
    both = jitted()(variables(), rows, **arrays).logits
    other = rows.copy()
    other[:, :cut] = rows[:, :cut][:, ::-1]
    second = jitted()(variables(), other, **arrays).logits
    np.testing.assert_array_equal(both[:, cut:], second[:, cut:])
    self.assertGreater(np.abs(both - second)[:, :cut].max(), 1e-3)
    alone = rows.copy()
    alone[:, : T - cut] = rows[:, cut:]
    first = jitted()(variables(), alone, **whole()).logits
    np.testing.assert_allclose(
      first[:, : T - cut], both[:, cut:], atol=2e-5, rtol=1e-5
    )

  @parameterized.parameters(1, 2)
  def test_prefill_chunk_and_steps_equal_forward_for_ragged_rows(self, streams):
    want = jitted(streams)(variables(streams), tokens(), **whole()).logits
    rows, done = np.asarray(tokens()), np.array([0, 0])
    cache = model(streams).init_cache(2, T)
    for width, news in ((4, (4, 2)), (7, (5, 7)), (1, (1, 1)), (1, (1, 1))):
      chunk = np.full((2, width), 1, np.int32)
      valid = np.zeros((2, width), np.int32)
      for b, new in enumerate(news):
        chunk[b, :new] = rows[b, done[b] : done[b] + new]
        valid[b, :new] = 1
      out = jitted(streams)(
        variables(streams),
        chunk,
        cache=cache,
        segment_ids=valid,
        positions=done[:, None] + np.arange(width),
      )
      for b, new in enumerate(news):
        np.testing.assert_allclose(
          out.logits[b, :new],
          want[b, done[b] : done[b] + new],
          atol=2e-5,
          rtol=1e-5,
        )
      done, cache = done + news, out.cache

  def test_unstacked_for_sampling_it_is_the_same(self):
    flat = ds.model.stacks.unstack(config())
    apart = ds.model.stacks.unstack(config(), variables())
    got = jax.jit(ds.build(flat).apply)(apart, tokens(), **whole()).logits
    want = jitted()(variables(), tokens(), **whole()).logits
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


class TablesTest(parameterized.TestCase):
  def test_meshes_divide_the_rows(self):
    self.assertEqual(MEMORY.rows(3) % 128, 0)
    self.assertGreaterEqual(
      MEMORY.rows(3), int(MEMORY.sizes(3).reshape(3, -1).sum(axis=1).max())
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('rows',))
    places = nnx.to_pure_dict(
      sharding.shardings(model().abstract['params'], mesh, {'tables': 'rows'})
    )
    table = places['segments'][0][1]['engram']['table']
    self.assertEqual(table.spec, jax.sharding.PartitionSpec(None, 'rows', None))

  def test_a_token_uses_as_much_of_the_tables_as_it_reads(self):
    count = ds.plan.count_parameters(config())
    rows, read = MEMORY.rows(3) * 3, 2 * 6  # of three numbers each; two orders
    self.assertEqual(count.total - count.active, 3 * (rows - read))
    self.assertEqual(count.total, tiny.size(initial()['params']))

  def test_tables_do_not_decay_beside_muon_either(self):
    cfg = optim.OptimizerConfig(decay=0.5, clip=1e9, muon=muon.MuonConfig())
    update = optim.update_rule(cfg, model().abstract['params'])
    params = variables()['params']
    grads = jax.tree.map(jnp.ones_like, params)
    got = jax.jit(lambda g, p: update.update(g, update.init(p), p)[0])(
      grads, params
    )
    table = got['segments'][0][1]['engram']['table']
    np.testing.assert_allclose(table, -5, rtol=1e-5)
    norm = -1 - 0.5 * params['norm']['scale']  # these do
    np.testing.assert_allclose(got['norm']['scale'], norm, rtol=1e-5)

  def test_tables_learn_five_times_as_fast_and_do_not_decay(self):
    cfg = optim.OptimizerConfig(decay=0.5, clip=1e9)
    update = optim.adamw(cfg, model().abstract['params'])
    params = variables()['params']
    grads = jax.tree.map(jnp.ones_like, params)
    once = lambda g, p: update.update(g, update.init(p), p)[0]
    got = jax.jit(once)(grads, params)
    memory = got['segments'][0][1]['engram']
    weights = params['segments'][0][1]['engram']
    # The first step of Adam is the sign of the gradient.
    np.testing.assert_allclose(memory['table'], -5, rtol=1e-5)
    np.testing.assert_allclose(
      memory['value'], -1 - 0.5 * weights['value'], rtol=1e-5
    )
    norm = optax.tree.norm(got['norm'])
    self.assertAlmostEqual(float(norm), DIM**0.5, places=4)

  @parameterized.parameters(
    ({'base': 1}, 'engram.base = 1: must be at least 2'),
    ({'longest': 1}, 'engram.longest = 1: must be at least 2'),
    ({'heads': 4}, 'engram.dim = 6: must be a multiple of heads = 4'),
    ({'conv': -1}, 'engram.conv = -1: must be at least 0'),
    ({'conv': 1}, 'engram.conv = 1: one tap'),
  )
  def test_settings_that_mean_nothing_are_refused(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      dataclasses.replace(MEMORY, **fields)

  @parameterized.parameters(
    ({'engram': None}, 'kinds.memory.engram = True: needs engram'),
    (
      {'mtp': ds.model.mtp.MTPConfig(1, 'memory')},
      "mtp.block = 'memory': has an Engram",
    ),
    (
      {'engram': dataclasses.replace(MEMORY, base=2**30)},
      'engram.base = 1073741824: .* rows in a layer',
    ),
  )
  def test_models_that_mean_nothing_are_refused(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      dataclasses.replace(config(), **fields)


if __name__ == '__main__':
  absltest.main()
