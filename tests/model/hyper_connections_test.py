"""Hyper-connections against float64, their limits, and whole models of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model import hyper_connections as hc
from deepseek_jax.model import kernels
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.residual import ResidualConfig
from pallas_kernels import dispatch, target
from tests import tiny

DIM = 6
CFG = HyperConnectionsConfig()


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def reference_comb(logits, cfg):
  """One token's matrix, line by line in float64."""
  n = cfg.streams
  m = np.zeros((n, n))
  for j in range(n):
    e = np.exp(logits[j] - logits[j].max())
    m[j] = e / e.sum() + cfg.eps
  for i in range(cfg.iterations):
    if i:
      for j in range(n):
        m[j] = m[j] / (m[j].sum() + cfg.eps)
    for k in range(n):
      m[:, k] = m[:, k] / (m[:, k].sum() + cfg.eps)
  return m


def reference(p, cfg, stream, y):
  """One token's streams [n D] and output [D] -> (input [D], streams)."""
  n = cfg.streams
  f = stream.reshape(-1)
  f = f / np.sqrt((f * f).mean() + cfg.norm_eps)
  mix = f @ p['fn'].reshape(f.size, -1)
  pre = sigmoid(mix[:n] * p['scale'][0] + p['base'][:n]) + cfg.eps
  post = 2 * sigmoid(mix[n : 2 * n] * p['scale'][1] + p['base'][n : 2 * n])
  logits = mix[2 * n :] * p['scale'][2] + p['base'][2 * n :]
  comb = reference_comb(logits.reshape(n, n), cfg)
  new = np.zeros_like(stream)
  for k in range(n):
    new[k] = post[k] * y + sum(comb[j, k] * stream[j] for j in range(n))
  return sum(pre[j] * stream[j] for j in range(n)), new


@functools.cache
def built(cfg, seed=0):
  """A connection with random weights; those as float64."""
  module = cfg.build(DIM, std=1.0, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  rng = np.random.default_rng(seed)
  draw = lambda a: rng.normal(size=a.shape).astype(np.float32)
  weights = jax.tree.map(draw, nnx.to_pure_dict(state))
  merge = lambda w: nnx.merge(graphdef, w)
  return merge, weights, jax.tree.map(np.float64, weights)


def inputs(cfg, tokens=3, seed=1):
  rng = np.random.default_rng(seed)
  stream = rng.normal(size=(1, tokens, cfg.streams, DIM))
  return stream, rng.normal(size=(1, tokens, DIM))


def run(merge, weights, stream, y):
  module = merge(weights)
  x, how = module.read(stream)
  return x, module.write(stream, y, how)


class ConnectionTest(parameterized.TestCase):
  @parameterized.parameters(
    CFG,
    HyperConnectionsConfig(streams=3, iterations=1, eps=1e-3),
    HyperConnectionsConfig(streams=2, iterations=5, norm_eps=0.5),
  )
  def test_equals_float64(self, cfg):
    merge, weights, p = built(cfg)
    stream, y = inputs(cfg)
    got = jax.jit(functools.partial(run, merge))(weights, stream, y)
    for t in range(3):
      x, new = reference(p, cfg, stream[0, t], y[0, t])
      # float32, twenty rounds of divisions that do not grow errors.
      np.testing.assert_allclose(got[0][0, t], x, atol=1e-5)
      np.testing.assert_allclose(got[1][0, t], new, atol=1e-5)

  def test_writing_by_the_kernels_reference_gives_the_same(self):
    merge, weights, _ = built(CFG)
    stream, y = (jnp.asarray(a, jnp.float32) for a in inputs(CFG))
    want = run(merge, weights, stream, y)
    with kernels.using('reference'), dispatch.recorded() as found:
      got = run(merge, weights, stream, y)
    self.assertIn('write_streams', {c.op for c in found})
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)

  def test_head_equals_float64(self):
    module = CFG.head(DIM, std=1.0, rngs=nnx.Rngs(0))
    module.base[...] = jnp.array([0.3, -1, 0.5, 2])
    module.scale[...] = jnp.array([0.7])
    stream, _ = inputs(CFG)
    got = module.collapse(stream.astype(np.float32))
    fn = np.float64(module.fn[...]).reshape(-1, 4)
    for t in range(3):
      f = stream[0, t].reshape(-1)
      mix = f / np.sqrt((f * f).mean() + 1e-6) @ fn
      pre = sigmoid(mix * 0.7 + [0.3, -1, 0.5, 2]) + 1e-6
      np.testing.assert_allclose(got[0, t], pre @ stream[0, t], atol=1e-5)

  @parameterized.parameters('connection', 'head')
  def test_reading_and_norm_in_one_give_the_norm_of_what_is_read(self, which):
    make = CFG.build if which == 'connection' else CFG.head
    module = make(DIM, std=1.0, rngs=nnx.Rngs(0))
    norm = RMSNorm(DIM, eps=1e-3, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(1.0, DIM + 1)
    stream = jnp.asarray(inputs(CFG)[0], jnp.float32)
    if which == 'head':
      read, fused = module.collapse, module.collapse_normed
    else:
      read = lambda stream: module.read(stream)[0]
      fused = lambda stream, norm: module.read_normed(stream, norm)[0]
    want = norm(read(stream))
    for impl in (None, 'reference'):
      with kernels.using(impl):
        np.testing.assert_allclose(fused(stream, norm), want, atol=2e-5)
    wide = make(1024, std=1.0, rngs=nnx.Rngs(0))
    fused = wide.collapse_normed if which == 'head' else wide.read_normed
    norm = RMSNorm(1024, rngs=nnx.Rngs(0))
    stream = jax.ShapeDtypeStruct((2, 3, 4, 1024), jnp.bfloat16)
    with target.targeting('cuda', '9.0'), dispatch.recorded() as found:
      jax.eval_shape(lambda stream: fused(stream, norm), stream)
    self.assertIn(('collapse_norm', 'gpu'), {(c.op, c.impl) for c in found})

  def test_gradients_equal_central_differences_in_float64(self):
    merge, weights, p = built(CFG)
    stream, y = inputs(CFG, tokens=1)
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=DIM), rng.normal(size=(4, DIM))

    def value(weights, stream, y):
      x, new = run(merge, weights, stream, y)
      return (x[0, 0] * a).sum() + (new[0, 0] * b).sum()

    grads = jax.jit(jax.grad(value, (0, 1, 2)))(
      weights, jnp.float32(stream), jnp.float32(y)
    )

    def truth(p, stream, y):
      x, new = reference(p, CFG, stream[0, 0], y[0, 0])
      return (x * a).sum() + (new * b).sum()

    point = (p, stream, y)
    for i, leaf in enumerate(jax.tree.leaves(point)):
      way = rng.normal(size=leaf.shape)

      def along(t, i=i, way=way):
        leaves, tree = jax.tree.flatten(point)
        leaves[i] = leaves[i] + t * way
        return truth(*jax.tree.unflatten(tree, leaves))

      slope = (along(1e-5) - along(-1e-5)) / 2e-5
      got = (np.float64(jax.tree.leaves(grads)[i]) * way).sum()
      np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)

  def test_columns_are_convex_and_rows_nearly(self):
    mix = 3 * np.random.default_rng(0).normal(size=(500, 24))
    pre, post, comb = jax.jit(
      lambda m: hc.maps(m, jnp.ones(3), jnp.zeros(24), CFG)
    )(jnp.float32(mix))
    np.testing.assert_allclose(comb.sum(1), 1, atol=5e-6)
    rows = np.abs(np.asarray(comb).sum(2) - 1)
    self.assertLess(rows.max(), 0.2)
    self.assertLess(rows.mean(), 0.01)
    self.assertGreater(rows.max(), 1e-4)  # the loop ends on columns
    self.assertTrue(((pre > 0) & (pre < 1 + 2e-6)).all())
    self.assertTrue(((post > 0) & (post < 2)).all())

  def test_comb_is_applied_from_the_first_index(self):
    """Stream j sends comb[j, k] to stream k, not the other way round."""
    module = CFG.build(DIM, std=0.0, rngs=nnx.Rngs(0))
    logits = np.full((4, 4), -30.0)
    for j, k in enumerate([1, 2, 3, 0]):  # j goes to its next stream
      logits[j, k] = 30
    base = np.concatenate([np.zeros(4), np.full(4, -60), logits.reshape(-1)])
    module.base[...] = jnp.float32(base)
    stream, y = inputs(CFG)
    stream = jnp.float32(stream)
    _, how = module.read(stream)
    new = module.write(stream, y, how)
    np.testing.assert_allclose(new, jnp.roll(stream, 1, axis=2), atol=1e-4)

  @parameterized.parameters(1.0, 30.0, 300.0, 3e4)
  def test_gradients_are_finite_at_any_magnitude(self, size):
    rng = np.random.default_rng(0)
    mix = np.concatenate([rng.normal(size=(300, 24)) * size, np.zeros((1, 24))])
    way = jnp.float32(rng.normal(size=(301, 4, 4)))

    def value(mix):
      pre, post, comb = hc.maps(mix, jnp.ones(3), jnp.zeros(24), CFG)
      return (comb * way).sum() + pre.sum() + post.sum()

    grad = jax.jit(jax.grad(value))(jnp.float32(mix))
    self.assertTrue(np.isfinite(grad).all())
    self.assertGreater(float(jnp.abs(grad).max()), 0)

  def test_starts_as_the_paper_does(self):
    module = CFG.build(DIM, std=0.02, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.scale[...], np.float32([0.01] * 3))
    np.testing.assert_array_equal(module.base[...][:8], 0)
    np.testing.assert_array_equal(
      module.base[...][8:].reshape(4, 4), np.eye(4, dtype=np.float32)
    )
    stream = jnp.ones((1, 1, 4, DIM))
    _, (post, comb) = module.read(stream)
    np.testing.assert_allclose(post, 1, atol=2e-3)
    self.assertGreater(float(comb[0, 0].diagonal().min()), 0.4)

  def test_bfloat16_streams_are_mixed_in_float32(self):
    merge, weights, p = built(CFG)
    stream, y = inputs(CFG)
    stream, y = (jnp.asarray(a, jnp.bfloat16) for a in (stream, y))
    x, new = run(merge, weights, stream, y)
    self.assertEqual((x.dtype, new.dtype), (jnp.bfloat16, jnp.bfloat16))
    for t in range(3):
      want = reference(p, CFG, np.float64(stream[0, t]), np.float64(y[0, t]))
      # One rounding to 8 bits, of the result.
      np.testing.assert_allclose(
        np.float64(new[0, t]), want[1], rtol=2**-7, atol=1e-3
      )

  @parameterized.parameters('streams', 'iterations')
  def test_numbers_below_1_are_refused(self, name):
    with self.assertRaisesRegex(ds.InputError, f'residual.{name} = 0: must'):
      dataclasses.replace(CFG, **{name: 0})

  def test_streams_of_their_own_need_streams(self):
    with self.assertRaisesRegex(ds.InputError, 'mtp.streams = True'):
      dataclasses.replace(tiny.config('v3'), mtp=MTPConfig(1, streams=True))


def config(streams=True):
  mtp = MTPConfig(1, 'dense', streams=streams)
  return dataclasses.replace(tiny.config('gqa'), residual=CFG, mtp=mtp)


def jit(f):
  """Compiled quickly: these programs are small."""
  return jax.jit(f, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def model_and_variables(streams=True):
  model = ds.build(config(streams))
  return model, tiny.draw(model)


def identity(tree):
  """The parameters with every connection set to the plain residual."""
  if not isinstance(tree, dict):
    return tree
  out = {k: identity(v) for k, v in tree.items()}
  if set(out) == {'fn', 'base', 'scale'}:
    pre = np.array([40.0, -40, -40, -40])
    maps = out['base'].shape[-1]
    base = np.concatenate([pre, np.zeros(4), 80 * np.eye(4).reshape(-1) - 40])
    shape = out['base'].shape
    out['base'] = jnp.float32(np.broadcast_to(base[:maps], shape))
    out['scale'] = jnp.zeros_like(out['scale'])
  return out


def without(tree):
  """The parameters without connections."""
  if not isinstance(tree, dict):
    return tree
  return {k: without(v) for k, v in tree.items() if 'residual' not in str(k)}


class ModelTest(parameterized.TestCase):
  def test_identity_maps_equal_the_plain_residual(self):
    model, variables = model_and_variables(streams=False)
    variables = {**variables, 'params': identity(variables['params'])}
    plain = dataclasses.replace(model.config, residual=ResidualConfig())
    plain = ds.build(plain)
    simple = {**variables, 'params': without(variables['params'])}
    tokens = tiny.tokens(2, 7)
    got = jit(lambda v: model.apply(v, tokens, mtp=True))(variables)
    want = jit(lambda v: plain.apply(v, tokens, mtp=True))(simple)
    # The maps hold eps = 1e-6 here and there.
    self.assertLess(tiny.relative(got.logits, want.logits), 1e-4)
    for a, b in zip(got.aux['mtp_hidden'], want.aux['mtp_hidden']):
      self.assertLess(tiny.relative(a, b), 1e-4)

  def test_scan_and_remat_give_the_same(self):
    model, variables = model_and_variables()
    tokens = tiny.tokens(2, 10)

    def value(model, variables):
      out = model.apply(variables, tokens, mtp=True)
      total = (out.logits**2).mean()
      return total + sum((h**2).mean() for h in out.aux['mtp_hidden'])

    run = lambda model: jit(
      jax.value_and_grad(lambda p: value(model, {**variables, 'params': p}))
    )(variables['params'])
    want, grads = run(model)
    for changes in ({'compute.scan': False}, {'compute.remat': 'full'}):
      got, others = run(ds.build(ds.changed(model.config, changes)))
      np.testing.assert_allclose(got, want, rtol=1e-5)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        others,
        grads,
      )
    self.assertTrue(all(np.isfinite(g).all() for g in jax.tree.leaves(grads)))
    moved = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)]
    self.assertGreater(min(moved), 0)

  def test_decoding_equals_forward(self):
    model, variables = model_and_variables()
    tokens = tiny.tokens(2, 6)
    want = jit(model.apply)(variables, tokens).logits
    step = jit(lambda v, t, c: model.apply(v, t, cache=c))
    out = step(variables, tokens[:, :3], model.init_cache(2, 6))
    for t in range(3, 6):
      out = step(variables, tokens[:, t : t + 1], out.cache)
      self.assertLess(tiny.relative(out.logits[:, 0], want[:, t]), 1e-5)


if __name__ == '__main__':
  absltest.main()
