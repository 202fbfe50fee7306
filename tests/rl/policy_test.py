"""The GRPO family against TRL's numbers, a loop and finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.rl import grpo, policy
from deepseek_jax.rl.advantages import AdvantageConfig, LengthPenaltyConfig
from tests.rl import golden


def tokens(
  new, old=golden.OLD, mask=golden.MASK, sampler=None, rows=slice(None)
):
  """Returns the golden batch as `policy.PolicyTokens`, one answer a row."""
  advantages = np.broadcast_to(golden.ADVANTAGES[:, None], mask.shape)
  old = jax.lax.stop_gradient(new) if old is None else jnp.asarray(old)[rows]
  answers = np.ones(mask.shape, np.int32)
  return policy.PolicyTokens(
    new,
    old,
    old if sampler is None else jnp.asarray(sampler)[rows],
    *(jnp.asarray(a)[rows] for a in (golden.REFERENCE, advantages, mask)),
    jnp.asarray(answers)[rows],
  )


def value_and_grad(cfg, **batch):
  """Returns the loss and its gradient in float64."""
  with jax.enable_x64(True):
    loss = lambda new: policy.loss(cfg, tokens(new, **batch))
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(golden.NEW))
    return float(value), np.asarray(gradient)


def numpy_loss(cfg, new, old):
  """The clipped objective with its KL as the papers print it, in a loop."""
  rows = []
  for i, length in enumerate(golden.LENGTHS):
    row = []
    for t in range(length):
      A, r = golden.ADVANTAGES[i], np.exp(new[i, t] - old[i, t])
      clipped = min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high)
      d = golden.REFERENCE[i, t] - new[i, t]
      k3 = np.exp(d) - d - 1
      kl = {'none': 0, 'k1': -d, 'k2': d * d / 2, 'k3': k3, 'ratio_k3': r * k3}
      row.append(min(r * A, clipped * A) - cfg.kl_weight * kl[cfg.kl])
    rows.append(row)
  if cfg.aggregation == 'sequence_mean':
    return -np.mean([np.mean(row) for row in rows])
  total = -sum(map(sum, rows))
  divisors = {
    'sum': 1,
    'constant': len(rows) * (cfg.length or 1),
    'token_mean': golden.LENGTHS.sum(),
    'micro_batch_mean': golden.LENGTHS.sum(),
  }
  return total / divisors[cfg.aggregation]


class GoldenTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (name.replace(' ', '_'), name) for name in golden.CASES
  )
  def test_loss_and_gradient_norm_are_those_of_trl(self, name):
    fields, on_policy, _, loss, norm = golden.CASES[name]
    cfg = grpo.GRPOConfig(**fields)
    batch = {'old': None} if on_policy else {}
    found, gradient = value_and_grad(cfg, **batch)
    self.assertAlmostEqual(found, loss, delta=1e-9)
    self.assertAlmostEqual(np.linalg.norm(gradient), norm, delta=1e-9)

  def test_on_policy_values_agree_and_gradients_do_not(self):
    found = {
      kl: value_and_grad(grpo.GRPOConfig(kl=kl, kl_weight=0.1), old=None)
      for kl in ('k3', 'ratio_k3')
    }
    self.assertAlmostEqual(found['k3'][0], found['ratio_k3'][0], delta=1e-14)
    self.assertGreater(
      np.abs(found['k3'][1] - found['ratio_k3'][1]).max(), 1e-3
    )

  @parameterized.product(
    kl=('none', 'k1', 'k2', 'k3', 'ratio_k3'),
    aggregation=('sequence_mean', 'token_mean', 'constant', 'sum'),
  )
  def test_gradient_is_that_of_a_loop(self, kl, aggregation):
    cfg = grpo.GRPOConfig(
      clip_high=0.28,
      kl=kl,
      kl_weight=0.3 * (kl != 'none'),
      aggregation=aggregation,
      length=7 if aggregation == 'constant' else None,
    )
    loss, gradient = value_and_grad(cfg)
    want = numpy_loss(cfg, golden.NEW, golden.OLD)
    self.assertAlmostEqual(loss, want, delta=1e-12)
    for at in np.ndindex(golden.NEW.shape):
      step = np.zeros_like(golden.NEW)
      step[at] = 1e-6
      up, down = (
        numpy_loss(cfg, golden.NEW + s, golden.OLD) for s in (step, -step)
      )
      self.assertAlmostEqual(gradient[at], (up - down) / 2e-6, delta=1e-8)


class GradientTableTest(parameterized.TestCase):
  """At policy = old policy; the score of a token is its unit vector."""

  @parameterized.parameters(
    ('k1', lambda d: 1.0),
    ('k2', lambda d: -d),
    ('k3', lambda d: 1 - np.exp(d)),
    ('ratio_k3', lambda d: -d),
  )
  def test_of_each_estimate_of_the_divergence(self, kind, want):
    with jax.enable_x64(True):
      for d in (-1.3, -0.2, 0.0, 0.4, 2.0):
        value = lambda lp, d=d: policy.divergence(kind, d - lp, jnp.exp(lp))
        self.assertAlmostEqual(jax.grad(value)(0.0), want(d), delta=1e-12)

  def test_of_the_policy_term_is_the_advantage(self):
    for surrogate in ('clip', 'cispo'):
      cfg = grpo.GRPOConfig(surrogate=surrogate, aggregation='sum')
      _, gradient = value_and_grad(cfg, old=None)
      want = -golden.ADVANTAGES[:, None] * golden.MASK
      np.testing.assert_allclose(gradient, want, atol=1e-12)

  def test_k2_and_ratio_k3_have_that_of_the_reverse_kl(self):
    # Expectations over a softmax: exact sums over its tokens.
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      z, ref = jnp.asarray(rng.normal(size=(2, 7)))
      log_ref = jax.nn.log_softmax(ref)

      def reverse(z):
        log_p = jax.nn.log_softmax(z)
        return (jnp.exp(log_p) * (log_p - log_ref)).sum()

      def forward(z):
        return -(jnp.exp(log_ref) * jax.nn.log_softmax(z)).sum()

      def estimate(z, kind):
        p = jax.nn.softmax(jax.lax.stop_gradient(z))
        log_p = jax.nn.log_softmax(z)
        ratio = jnp.exp(log_p - jax.lax.stop_gradient(log_p))
        return (p * policy.divergence(kind, log_ref - log_p, ratio)).sum()

      grad = {
        k: jax.grad(estimate)(z, k) for k in ('k1', 'k2', 'k3', 'ratio_k3')
      }
      zero = np.zeros(7)
      np.testing.assert_allclose(grad['k1'], zero, atol=1e-14)
      want = jax.grad(reverse)(z)
      np.testing.assert_allclose(grad['k2'], want, atol=1e-14)
      np.testing.assert_allclose(grad['ratio_k3'], want, atol=1e-14)
      np.testing.assert_allclose(grad['k3'], jax.grad(forward)(z), atol=1e-14)


class InvarianceTest(parameterized.TestCase):
  CONFIGS = tuple(
    grpo.GRPOConfig(
      clip_high=0.28,
      kl='ratio_k3',
      kl_weight=0.1,
      off_policy_bound=0.1,
      aggregation=name,
      length=8 if name == 'constant' else None,
    )
    for name in ('sequence_mean', 'token_mean', 'constant', 'sum')
  )

  @parameterized.parameters(*((c,) for c in CONFIGS))
  def test_order_padding_and_micro_batches_change_nothing(self, cfg):
    want, gradient = value_and_grad(cfg)
    with jax.enable_x64(True):
      new, order = jnp.asarray(golden.NEW), np.array([2, 0, 3, 1])
      whole = tokens(new)
      shuffled = jax.tree.map(lambda a: a[order], whole)
      self.assertAlmostEqual(policy.loss(cfg, shuffled), want, delta=1e-14)
      # Prompts before, padding behind and a row of it may hold anything; one
      # has the answer's own number, the other another.
      widen = functools.partial(jnp.pad, pad_width=((0, 1), (2, 3)))
      wide = jax.tree.map(
        lambda a: widen(a, constant_values=a.dtype.type(4)), whole
      )
      mask = widen(whole.mask)
      wide = wide._replace(
        mask=mask,
        sampler=jnp.where(mask > 0, wide.sampler, jnp.nan),
        answers=wide.answers.at[:, :2].set(1),
      )
      self.assertAlmostEqual(policy.loss(cfg, wide), want, delta=1e-14)
      for count in (1, 2, 4):
        self.check_micro_batches(cfg, whole, count, want, gradient)

  def check_micro_batches(self, cfg, whole, count, want, gradient):
    of = lambda t: policy.weights(cfg.aggregation, t.mask, t.answers)
    parts = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), whole)
    found = grads = 0
    for i in range(count):
      part = jax.tree.map(lambda a, i=i: a[i], parts)

      def share(new, part=part):
        part = part._replace(policy=new)
        value = policy.terms(cfg, part).objective
        return -policy.total(cfg, value, part, of(whole).sum(), count)

      value, g = jax.value_and_grad(share)(part.policy)
      found += value
      grads = [*(grads or []), g]
    self.assertAlmostEqual(found, want, delta=1e-14)
    np.testing.assert_allclose(np.concatenate(grads), gradient, atol=1e-14)

  @parameterized.parameters(*((c,) for c in CONFIGS))
  def test_answers_packed_into_one_row_are_the_same(self, cfg):
    want, _ = value_and_grad(cfg)
    with jax.enable_x64(True):
      whole = tokens(jnp.asarray(golden.NEW))
      row = jax.tree.map(lambda a: a.reshape(1, -1), whole)
      answers = np.repeat(np.arange(1, 5), 5)[None]
      row = row._replace(answers=jnp.asarray(answers))
      self.assertAlmostEqual(policy.loss(cfg, row), want, delta=1e-14)

  @parameterized.parameters(*((c,) for c in CONFIGS))
  def test_a_masked_answer_counts_nowhere(self, cfg):
    keep = np.array([0, 1, 3])
    mask = golden.MASK.copy()
    mask[2] = 0
    loss, gradient = value_and_grad(cfg, mask=mask)
    with jax.enable_x64(True):
      few = jax.tree.map(lambda a: a[keep], tokens(jnp.asarray(golden.NEW)))
      self.assertAlmostEqual(policy.loss(cfg, few), loss, delta=1e-14)
    self.assertTrue((gradient[2] == 0).all())


class TermsTest(absltest.TestCase):
  def test_the_mask_leaves_the_divergence_alone(self):
    fields = {'kl': 'ratio_k3', 'kl_weight': 0.1, 'aggregation': 'sum'}
    bound = grpo.GRPOConfig(**fields, off_policy_bound=0.1)
    with jax.enable_x64(True):
      made = policy.terms(bound, tokens(jnp.asarray(golden.NEW)))
      kept = made.statistics['kept'] * golden.MASK
      np.testing.assert_array_equal(kept[:, 0], [1, 0, 1, 0])
      d = golden.REFERENCE - golden.NEW
      kl = np.exp(golden.NEW - golden.OLD) * (np.expm1(d) - d)
      want = -0.1 * (kl * golden.MASK)[1]
      np.testing.assert_allclose(made.objective[1], want, atol=1e-14)

  def test_the_mask_reads_the_sampler_and_not_the_old_policy(self):
    cfg = grpo.GRPOConfig(off_policy_bound=0.1)
    with jax.enable_x64(True):
      sampler = golden.NEW + np.where(golden.ADVANTAGES < 0, 0.05, 9)[:, None]
      sampler[1, 1] = np.nan  # a token that it did not score
      batch = tokens(jnp.asarray(golden.NEW), sampler=sampler)
      kept = policy.terms(cfg, batch).statistics['kept']
      np.testing.assert_array_equal(kept, golden.MASK)

  def test_dual_clip_bounds_bad_tokens_alone(self):
    with jax.enable_x64(True):
      for clips in ({}, {'clip_low': None, 'clip_high': None}):
        cfg = grpo.GRPOConfig(dual_clip=3.0, aggregation='sum', **clips)
        old = golden.NEW - 2.0
        gradient = value_and_grad(cfg, old=old)[1]
        made = policy.terms(cfg, tokens(jnp.asarray(golden.NEW), old=old))
        bad = golden.ADVANTAGES < 0
        want = (3 * golden.ADVANTAGES[:, None] * golden.MASK)[bad]
        np.testing.assert_allclose(made.objective[bad], want)
        self.assertTrue((gradient[bad] == 0).all())

  def test_far_log_ratios_stay_finite_and_are_counted(self):
    cfg = grpo.GRPOConfig(clip_low=None, clip_high=None, kl='k3', kl_weight=1.0)
    with jax.enable_x64(False):
      new = jnp.float32(golden.NEW)
      batch = tokens(new, old=golden.NEW - 200)._replace(reference=new + 500)
      made = policy.terms(cfg, batch)
      self.assertTrue(np.isfinite(made.objective).all())
      np.testing.assert_array_equal(made.statistics['limited'], golden.MASK)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'aggregation': 'constant'}, 'length = None'),
    ({'length': 8}, 'length = 8'),
    ({'kl': 'k3'}, 'kl_weight = 0.0'),
    ({'kl_weight': 0.1}, 'kl_weight = 0.1'),
    ({'kl': 'k4', 'kl_weight': 0.1}, 'kl = '),
    ({'aggregation': 'mean'}, 'aggregation = '),
    ({'dual_clip': 0.5}, 'dual_clip = 0.5'),
    ({'temperature': 0.0}, 'temperature = 0.0'),
  )
  def test_what_does_not_fit_is_refused(self, fields, message):
    with self.assertRaisesRegex(InputError, message):
      grpo.GRPOConfig(**fields)

  def test_presets_say_what_the_papers_say(self):
    token, group = 'token', AdvantageConfig(scale='group')
    plain = AdvantageConfig(scale='none')
    # Every field, so that no default can turn another.
    r1 = grpo.GRPOConfig(
      ratio=token, surrogate='clip', clip_low=10.0, clip_high=10.0,
      kl='k3', kl_weight=0.001, reference_every=400,
      aggregation='sequence_mean', advantage=group,
    )  # fmt: skip
    v32 = grpo.GRPOConfig(
      ratio=token, surrogate='clip', clip_low=0.2, clip_high=0.2,
      kl='ratio_k3', kl_weight=0.001, off_policy_bound=0.1,
      aggregation='sequence_mean', advantage=plain,
      keep_sampling_mask=True, keep_routing=True,
    )  # fmt: skip
    dapo = grpo.GRPOConfig(
      ratio=token, surrogate='clip', clip_low=0.2, clip_high=0.28,
      aggregation='token_mean', advantage=group, dynamic_sampling=True,
      length_penalty=LengthPenaltyConfig(20480, 4096, weight=1.0),
    )  # fmt: skip
    dr_grpo = grpo.GRPOConfig(
      ratio=token, surrogate='clip', clip_low=0.2, clip_high=0.2,
      aggregation='constant', length=8, advantage=plain,
    )  # fmt: skip
    found = {
      'r1_zero': (grpo.r1_zero(), r1),
      'r1': (grpo.r1(), r1),
      'v32': (grpo.v32(off_policy_bound=0.1), v32),
      'dapo': (grpo.dapo(), dapo),
      'dr_grpo': (grpo.dr_grpo(length=8), dr_grpo),
    }
    for name, (got, want) in found.items():
      self.assertEqual(got, want, name)
    self.assertEqual(set(found), set(grpo.PRESETS))
    self.assertEqual(grpo.v32(off_policy_bound=0.1, kl_weight=0.0).kl, 'none')
    # Longest answer 20,480: DAPO's own penalty.
    self.assertEqual(grpo.PRESETS['dapo'](20480), dapo)
    with self.assertRaises(TypeError):  # delta is not published
      grpo.v32()

  def test_r1_never_clips_from_below(self):
    cfg = dataclasses.replace(
      grpo.r1(), kl='none', kl_weight=0.0, reference_every=0
    )
    new = golden.NEW + 0
    with jax.enable_x64(True):
      batch = tokens(jnp.asarray(new), old=new + 9.0)
      made = policy.terms(cfg, batch).statistics
      self.assertEqual(float(made['clipped_low'].sum()), 0.0)


if __name__ == '__main__':
  absltest.main()
