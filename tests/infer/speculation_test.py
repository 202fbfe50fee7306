"""The law of what speculation emits, enumerated over all its random numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.infer import speculation
from tests import tiny
from tests.model import drafting_worker

NEAR = 1e-14  # how close to the ends of an interval it is tried


@functools.cache
def accept():
  return jax.jit(speculation.accept)


def tables(rng, V, k, sharp):
  """A distribution for every beginning of at most k tokens."""
  each = {}
  for n in range(k + 1):
    for beginning in itertools.product(range(V), repeat=n):
      x = np.exp(rng.normal(size=V) * sharp)
      each[beginning] = x / x.sum()
  return each


def masked(p, rng):
  """The same of a grammar: some tokens, other ones each time, never come."""
  out = {}
  for beginning, x in p.items():
    x = x.copy()
    x[rng.choice(len(x), rng.integers(1, len(x)), replace=False)] = 0
    out[beginning] = x / x.sum()
  return out


def hot(token, V):
  return np.eye(V)[token]


def ends(points):
  """[n 2] both ends of the intervals between points of [0, 1]."""
  points = np.unique(np.clip([0, *points, 1], 0, 1))
  pairs = np.stack([points[:-1], points[1:]], axis=-1)
  return pairs[pairs[:, 1] - pairs[:, 0] > 4 * NEAR]


def boxes(p, q, drafts):
  """Boxes of uniform numbers in which what comes out cannot change.

  [n 1+k 2]; worked out from the rule, so `law` checks it at all corners.
  """
  k, kept, out = len(drafts), [], []
  whole = np.array([0.0, 1.0])
  for j in range(k + 1):
    target = p[drafts[:j]]
    if j == k:
      left = target
    else:
      d = drafts[j]
      stays = min(1.0, target[d] / q[j][d])
      left = np.maximum(target - q[j], 0)
    if left.sum() > 1e-13 and (j == k or stays < 1):
      for last in ends(np.cumsum(left) / left.sum()):
        own = [] if j == k else [np.array([stays, 1.0])]
        rest = [whole] * (k - j - len(own))
        out.append([*kept, *own, *rest, last])
    if j == k or stays == 0:
      break
    kept.append(np.array([0.0, stays]))
  return np.array(out)


def law(V, k, p, q, sampled):
  """({tokens: probability}, probability that the first draft stays).

  q: beginning -> what a draft is drawn from; without `sampled` the drafts are
  its likeliest tokens. Tokens are the k + 1 first ones, those that are not
  emitted at once by plain draws from the target.
  """
  each = []
  for drafts in itertools.product(range(V), repeat=k):
    from_q = [q[drafts[:j]] for j in range(k)]
    if not sampled:
      from_q = [hot(row.argmax(), V) for row in from_q]
    weight = np.prod([row[d] for row, d in zip(from_q, drafts)])
    if weight > 0:
      each.append((drafts, from_q, weight, boxes(p, from_q, drafts)))
  corner = np.array(list(itertools.product((0, 1), repeat=k + 1)))
  rows, owner = [], []
  for i, (*_, box) in enumerate(each):
    inner = box + np.array([NEAR, -NEAR])
    at = inner[:, None, np.arange(k + 1), corner]  # [n corners 1+k]
    rows.append(at.reshape(-1, k + 1))
    owner += [i] * len(box)
  uniform = np.concatenate(rows)
  index = np.repeat(owner, len(corner))
  target = np.array([[p[d[:j]] for j in range(k + 1)] for d, *_ in each])
  drafts = np.array([d for d, *_ in each])
  probs = np.array([f for _, f, *_ in each]) if sampled else None
  with jax.enable_x64(True):
    got = accept()(
      jnp.asarray(target[index]),
      jnp.asarray(drafts[index], jnp.int32),
      jnp.full(len(index), k, jnp.int32),
      jnp.asarray(uniform),
      None if probs is None else jnp.asarray(probs[index]),
    )
  accepted, token = (np.asarray(a).reshape(-1, len(corner)) for a in got)
  # The same at every corner, and so all over the box.
  np.testing.assert_array_equal(
    accepted, accepted[:, :1].repeat(len(corner), 1)
  )
  np.testing.assert_array_equal(token, token[:, :1].repeat(len(corner), 1))
  out, stayed = {}, 0.0

  def emit(tokens, weight):
    if len(tokens) > k:
      out[tokens] = out.get(tokens, 0) + weight
    elif weight:
      for t in range(V):
        emit((*tokens, t), weight * p[tokens][t])

  volumes = np.concatenate(
    [np.prod(box[..., 1] - box[..., 0], axis=-1) for *_, box in each]
  )
  for i, a, t, volume in zip(owner, accepted[:, 0], token[:, 0], volumes):
    drafts, _, weight, _ = each[i]
    emit((*drafts[:a], int(t)), weight * volume)
    stayed += weight * volume * (a > 0)
  return out, stayed


class AcceptTest(parameterized.TestCase):
  @parameterized.product(
    V_k=((4, 1), (6, 1), (4, 2), (5, 2), (4, 3)),
    sampled=(False, True),
    grammar=(False, True),
  )
  def test_every_sequence_has_the_probability_of_plain_draws(
    self, V_k, sampled, grammar
  ):
    (V, k), rng = V_k, np.random.default_rng(sum(V_k))
    p, q = tables(rng, V, k, 1.5), tables(rng, V, k, 1.0)
    if grammar:
      p = masked(p, rng)
    got, stayed = law(V, k, p, q, sampled)
    total = 0.0
    for tokens in itertools.product(range(V), repeat=k + 1):
      want = np.prod([p[tokens[:j]][t] for j, t in enumerate(tokens)])
      self.assertLess(abs(got.get(tokens, 0) - want), 1e-12)
      total += got.get(tokens, 0)
    self.assertLess(abs(total - 1), 1e-12)
    first = q[()] if sampled else hot(q[()].argmax(), V)
    overlap = np.minimum(p[()], first).sum()
    self.assertLess(abs(stayed - overlap), 1e-12)

  @parameterized.parameters(True, False)
  def test_without_chance_the_likeliest_tokens_come_out(self, sampled):
    rng = np.random.default_rng(0)
    V, k = 5, 2
    best = {
      at: hot(row.argmax(), V) for at, row in tables(rng, V, k, 1.0).items()
    }
    got, _ = law(V, k, best, tables(rng, V, k, 1.0), sampled)
    tokens = ()
    for _ in range(k + 1):
      tokens = (*tokens, int(best[tokens].argmax()))
    self.assertAlmostEqual(got.pop(tokens), 1, delta=1e-12)
    self.assertEqual(sum(got.values()), 0)

  def test_drafts_beyond_a_rows_count_are_not_read(self):
    rng = np.random.default_rng(0)
    V, k, N = 5, 3, 4000
    target = rng.dirichlet(np.ones(V), (N, k + 1)).astype(np.float32)
    probs = rng.dirichlet(np.ones(V), (N, k)).astype(np.float32)
    drafts = rng.integers(0, V, (N, k)).astype(np.int32)
    uniform = rng.random((N, k + 1)).astype(np.float32)
    count = rng.integers(0, k + 1, N).astype(np.int32)
    args = target, drafts, count, uniform, probs
    got = accept()(*args)
    self.assertTrue((got.accepted <= count).all())
    beyond = np.arange(k) >= count[:, None]
    other = np.where(beyond, -1, drafts), np.where(beyond[..., None], 9, probs)
    same = accept()(target, other[0], count, uniform, other[1])
    np.testing.assert_array_equal(got.accepted, same.accepted)
    np.testing.assert_array_equal(got.token, same.token)
    # As many drafts as a row has, alone: the same.
    for n in range(k + 1):
      one = count == n
      less = [a[one][:, : n + 1] for a in (target, uniform)]
      less[1] = np.concatenate([less[1][:, :n], uniform[one][:, k:]], axis=1)
      few = [a[one][:, :n] for a in (drafts, probs)]
      alone = accept()(less[0], few[0], count[one], less[1], few[1])
      np.testing.assert_array_equal(got.accepted[one], alone.accepted)
      np.testing.assert_array_equal(got.token[one], alone.token)

  def test_equal_distributions_always_accept(self):
    """A product rounds up: 1 - 2^-24 of a number may be the number."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), (2000, 3)).astype(np.float32)
    drafts = rng.integers(0, 6, (2000, 2)).astype(np.int32)
    uniform = np.full((2000, 3), 1 - 2.0**-24, np.float32)
    count = np.full(2000, 2, np.int32)
    got = accept()(p, drafts, count, uniform, p[:, :2])
    self.assertEqual(int(got.accepted.min()), 2)

  def test_what_the_target_forbids_never_comes_out(self):
    rng = np.random.default_rng(0)
    N, V, k = 20000, 300, 2
    p = rng.dirichlet(np.full(V, 0.1), (N // 100, k + 1)).astype(np.float32)
    p = np.where(rng.random(p.shape) < 0.5, 0, p)
    p = np.repeat(p / p.sum(axis=-1, keepdims=True), 100, axis=0)
    edges = np.array([0, 2.0**-149, 0.5, 1 - 2.0**-24], np.float32)
    uniform = rng.random((N, k + 1)).astype(np.float32)
    uniform[:, k] = np.where(
      np.arange(N) % 2, uniform[:, k], edges[np.arange(N) % 4]
    )
    drafts = np.where(
      rng.random((N, k)) < 0.5, rng.integers(0, V, (N, k)), p[:, :k].argmax(-1)
    )
    count = np.full(N, k, np.int32)
    got = accept()(p, drafts, count, uniform)
    rows = np.arange(N)
    self.assertGreater(p[rows, got.accepted, got.token].min(), 0)
    for j in range(k):
      some = np.asarray(got.accepted) > j
      self.assertGreater(p[rows, j, drafts[:, j]][some].min(), 0)

  def test_a_hundred_thousand_draws_follow_the_target(self):
    rng = np.random.default_rng(0)
    N, V, k = 100_000, 5, 2
    p, q = tables(rng, V, k, 1.5), tables(rng, V, k, 1.0)
    table = lambda t, n: np.array(
      [t[c] for c in itertools.product(range(V), repeat=n)]
    )
    draw = lambda rows: (rows.cumsum(1) < rng.random((N, 1))).sum(1)
    first = draw(np.broadcast_to(q[()], (N, V)))
    second = draw(table(q, 1)[first])
    at = lambda t: (
      np.broadcast_to(t[()], (N, V)),
      table(t, 1)[first],
      table(t, 2)[first * V + second],
    )
    accepted, token = accept()(
      np.stack(at(p), 1).astype(np.float32),
      np.stack([first, second], 1).astype(np.int32),
      np.full(N, k, np.int32),
      jax.random.uniform(jax.random.key(0), (N, k + 1)),
      np.stack(at(q)[:k], 1).astype(np.float32),
    )
    one = np.where(accepted > 0, first, token)
    more = np.where(accepted > 1, second, token)
    more = np.where(accepted > 0, more, draw(table(p, 1)[one]))
    seen = np.bincount(one * V + more, minlength=V * V)
    want = N * (p[()][:, None] * table(p, 1)).reshape(-1)
    # 24 degrees of freedom: above 51.2 one time in 1,000.
    self.assertLess(((seen - want) ** 2 / want).sum(), 51.2)


class MatchTest(absltest.TestCase):
  def test_the_longest_equal_beginning_stays(self):
    plain = np.array([[1, 2, 3], [1, 2, 3], [9, 2, 3], [1, 2, 3]], np.int32)
    drafts = np.array([[1, 2], [1, 7], [1, 2], [1, 2]], np.int32)
    got = speculation.match(plain, drafts, np.array([2, 2, 2, 1]))
    self.assertEqual(got.accepted.tolist(), [2, 1, 0, 1])
    self.assertEqual(got.token.tolist(), [3, 2, 9, 2])


class ProposeTest(absltest.TestCase):
  def test_drafts_are_those_of_one_call_after_the_other(self):
    """Two blocks, the second one repeated; ragged rows, one without tokens."""
    name, k, slots = 'dense_mtp', 3, 4
    net, held = drafting_worker.model(name), drafting_worker.variables(name)
    state = np.asarray(drafting_worker.taught(name)[1])[[0, 1, 0], :3]
    tokens = tiny.tokens(2, 14)[[0, 1, 0], 1:4]
    count = np.array([3, 2, 0])

    def choose(logits, number):
      token, _ = speculation.likeliest(logits, number)
      return token, jax.nn.softmax(logits)

    run = functools.partial(speculation.propose, net, drafts=k, choose=choose)
    empty = net.init_mtp_cache(3, slots, spare=k)
    got = jax.jit(run)(held, state, tokens, empty, np.zeros(3, int), count)
    draft = jax.jit(net.draft, static_argnames='depth')
    for row in range(2):
      n, own = count[row], slice(row, row + 1)
      cache = net.init_mtp_cache(1, slots, spare=k)
      seen, given = state[own], tokens[own].copy()
      at, real = np.arange(3)[None], np.arange(3)[None] < n
      for number in range(k):
        out = draft(held, seen, given, cache, at, real, depth=number + 1)
        logits = np.asarray(out.logits[0, min(n, out.logits.shape[1]) - 1])
        token = logits.argmax()
        self.assertEqual(got.tokens[row, number], token)
        np.testing.assert_allclose(
          got.probs[row, number], jax.nn.softmax(logits), atol=1e-6
        )
        cache, seen = out.cache, np.asarray(out.state)
        if number == 0:
          given[0, : n - 1], given[0, n - 1] = given[0, 1:n].copy(), token
        else:
          seen, given = seen[:, n - 1 :][:, :1], np.array([[token]])
          at, real = at[:, n - 1 : n] + 1, np.array([[True]])
    # The row of 3 tokens ends where the cache does.
    self.assertEqual(got.cache.length.tolist(), [4, 3, 0])


if __name__ == '__main__':
  absltest.main()
