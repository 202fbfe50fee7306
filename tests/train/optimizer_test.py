"""AdamW against AdamW in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.train import optimizer as optim
from deepseek_jax.train.optimizer import OptimizerConfig
from tests import tiny

RATE = 0.01


@functools.cache
def params():
  return tiny.variables('llama')['params']


def gradients(step, size):
  return jax.tree.map(lambda g: g * size, tiny.fill(params(), 100 + step))


def decays(name):
  """Matrices do; the weights of norms, stacked or not, do not."""
  return not name.endswith('scale')


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='.')
  return {name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def by_hand(cfg, steps, size):
  p = flat(params())
  m = {k: np.zeros_like(v) for k, v in p.items()}
  v = {k: np.zeros_like(a) for k, a in p.items()}
  for t in range(1, steps + 1):
    g = flat(gradients(t, size))
    norm = np.sqrt(sum((a * a).sum() for a in g.values()))
    clip = min(1.0, cfg.clip / norm)
    for k in p:
      m[k] = cfg.beta1 * m[k] + (1 - cfg.beta1) * g[k] * clip
      v[k] = cfg.beta2 * v[k] + (1 - cfg.beta2) * (g[k] * clip) ** 2
      step = m[k] / (1 - cfg.beta1**t)
      step = step / (np.sqrt(v[k] / (1 - cfg.beta2**t)) + cfg.eps)
      p[k] = p[k] - RATE * (step + cfg.decay * p[k] * decays(k))
  return p


def run(cfg, steps, size):
  optimizer = optim.adamw(cfg, tiny.model('llama').abstract['params'])

  @jax.jit
  def update(grads, state, p):
    updates, state = optimizer.update(grads, state, p)
    return jax.tree.map(lambda a, u: a + RATE * u, p, updates), state

  p, state = params(), optimizer.init(params())
  for t in range(1, steps + 1):
    p, state = update(gradients(t, size), state, p)
  return flat(p), state


class AdamWTest(parameterized.TestCase):
  @parameterized.named_parameters(
    # The gradient norm is 25: the first is clipped, the second is not.
    ('clipped', OptimizerConfig(), 1.0),
    ('unclipped', OptimizerConfig(clip=1.0), 1e-2),
    ('strong_decay', OptimizerConfig(0.8, 0.99, 1e-3, 5.0), 1e-2),
  )
  def test_five_steps_equal_float64(self, cfg, size):
    got, want = run(cfg, 5, size)[0], by_hand(cfg, 5, size)
    self.assertCountEqual(got, want)
    for name in want:
      np.testing.assert_allclose(
        got[name], want[name], atol=2e-6, rtol=1e-5, err_msg=name
      )

  def test_the_defaults_are_the_published_recipe(self):
    cfg = OptimizerConfig()
    self.assertEqual(
      (cfg.beta1, cfg.beta2, cfg.decay, cfg.clip), (0.9, 0.95, 0.1, 1.0)
    )

  def test_the_gradient_norm_spans_all_leaves(self):
    sizes = [1.0, 1e-2]
    norms = [
      np.sqrt(sum((a * a).sum() for a in flat(gradients(1, s)).values()))
      for s in sizes
    ]
    self.assertGreater(norms[0], 10)
    self.assertLess(norms[1], 1)

  def test_a_clipped_gradient_scales_with_its_limit(self):
    grads = tiny.fill(params(), 3)
    clip = jax.jit(
      lambda grads, s: optim.clipped(s).update(
        jax.tree.map(lambda g: g * s, grads), None
      )[0]
    )
    want = clip(grads, np.float32(1))
    total = np.sqrt(sum((a * a).sum() for a in flat(want).values()))
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    for k in (-90, -64, -40, 40, 64, 110):
      s = np.float32(2.0) ** np.float32(k)
      got = clip(grads, s)
      jax.tree.map(
        lambda a, b, s=s: np.testing.assert_allclose(a, b * s, rtol=1e-6),
        got,
        want,
      )

  @parameterized.parameters(
    ([3e38, 3e37], 1.0), ([2.0**-126, 0.0], 2.0**-126), ([1e30, 1e-8], 1e-30)
  )
  def test_clipping_reaches_the_ends_of_float32(self, grads, limit):
    clip = jax.jit(lambda g: optim.clipped(limit).update(g, None)[0])
    got = np.asarray(clip(np.float32(grads)), np.float64)
    np.testing.assert_allclose(np.linalg.norm(got), limit, rtol=1e-6)

  @parameterized.parameters(0.0, 1e-40, np.inf, np.nan)
  def test_clipping_hides_nothing(self, bad):
    clip = jax.jit(lambda g: optim.clipped(1e-40).update(g, None)[0])
    got = np.asarray(clip(np.float32([bad, 0.0])))
    self.assertEqual(bool(np.isfinite(got).all()), bool(np.isfinite(bad)))

  def test_matrices_decay_and_norms_do_not(self):
    mask = flat(optim.matrices(tiny.model('v3').abstract['params']))
    self.assertEqual(
      {k: bool(v) for k, v in mask.items()}, {k: decays(k) for k in mask}
    )
    self.assertIn('segments.1.0.ffn_norm.scale', mask)  # stacked: [2 16]

  def test_bfloat16_moments_round_what_is_stored_and_nothing_else(self):
    exact, _ = run(OptimizerConfig(), 3, 1e-2)
    low, state = run(OptimizerConfig(moments='bfloat16'), 3, 1e-2)
    kinds = {a.dtype for a in jax.tree.leaves(state) if a.ndim}
    self.assertEqual(kinds, {jnp.dtype(jnp.bfloat16)})
    first, _ = run(OptimizerConfig(), 1, 1e-2)
    start = flat(params())
    first_low, _ = run(OptimizerConfig(moments='bfloat16'), 1, 1e-2)
    for name in exact:
      # The first step uses moments that were never stored: equal but for one
      # float32 rounding; bfloat16 would move the update of 0.01 by 2e-5.
      np.testing.assert_allclose(first_low[name], first[name], atol=1e-7)
      moved = np.abs(exact[name] - start[name]).max()
      error = np.abs(low[name] - exact[name]).max()
      self.assertLess(error, 2e-2 * moved, name)

  def test_the_step_count_is_never_rounded(self):
    inner = optim.stored_in(jnp.bfloat16, optim.optax.scale_by_adam())
    state = inner.init({'w': jnp.ones(3)})
    state = state._replace(count=jnp.int32(1001))
    _, state = inner.update({'w': jnp.ones(3)}, state)
    self.assertEqual(int(state.count), 1002)

  @parameterized.parameters('beta1', 'beta2')
  def test_betas_of_1_are_refused(self, name):
    with self.assertRaisesRegex(ds.InputError, f'{name} = 1.0'):
      OptimizerConfig(**{name: 1.0})


if __name__ == '__main__':
  absltest.main()
