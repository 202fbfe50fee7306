"""compress against loops in float64 and their gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.compress import compress, gpu
from pallas_kernels.compress.shapes import TEST, places
from tests.pallas_kernels import by_hand


def draw(shape, scale=1.0, seed=0):
  """kv, gate and bias; the last tokens of windows; a gradient."""
  rng = np.random.default_rng(seed)
  lasts = places(shape)
  L = max(map(sum, shape.documents))
  normal = lambda *size: rng.normal(size=size)
  f32 = lambda a: jnp.asarray(a, jnp.float32)
  # Sums of gate and bias are exact in float32, so that large ones weigh right.
  exact = lambda a: f32(np.round(64 * a) / 64)
  tokens = len(shape.documents), L, shape.series, shape.dim
  floats = (
    f32(normal(*tokens)),
    exact(scale * normal(*tokens)),
    exact(normal(shape.ratio, *tokens[2:])),
  )
  return floats, lasts, f32(normal(*lasts[0].shape, shape.dim))


def in_float64(floats, lasts, grad):
  """The entries and three gradients, entry by entry."""
  kv, gate, bias, grad = (np.asarray(a, np.float64) for a in (*floats, grad))
  m = len(bias)
  out, dkv, dgate = np.zeros_like(grad), np.zeros_like(kv), np.zeros_like(kv)
  dbias = np.zeros_like(bias)
  for b, s in np.ndindex(*lasts[0].shape):
    # The last token in each series.
    ends = [int(last[b, s]) for last in reversed(lasts)]
    if ends[-1] < 0:
      continue
    # (token, series, place) of all that the entry draws on.
    drawn = [
      (end - m + 1 + place, j, place)
      for j, end in enumerate(ends)
      for place in range(m if end >= 0 else 0)
    ]
    logits = np.stack([gate[b, t, j] + bias[i, j] for t, j, i in drawn])
    weights = np.exp(logits - logits.max(axis=0))
    weights /= weights.sum(axis=0)
    for w, (t, j, _) in zip(weights, drawn):
      out[b, s] += w * kv[b, t, j]
    for w, (t, j, i) in zip(weights, drawn):
      dkv[b, t, j] += w * grad[b, s]
      dlogit = w * grad[b, s] * (kv[b, t, j] - out[b, s])
      dgate[b, t, j] += dlogit
      dbias[i, j] += dlogit
  return out, dkv, dgate, dbias


def operation(lasts):
  return lambda *floats: compress(*floats, *lasts, impl='reference')


def small():
  """Two rows of two windows each, of one document and of two."""
  floats, lasts, grad = draw(
    TEST['index_keys']._replace(documents=((8,), (4, 4)))
  )
  return floats, [last[:, :2] for last in lasts], grad[:, :2]


class CompressTest(parameterized.TestCase):
  @parameterized.product(name=sorted(TEST), scale=(1.0, 30.0))
  def test_value_and_gradients_are_those_of_float64(self, name, scale):
    floats, lasts, grad = draw(TEST[name], scale)
    wanted = in_float64(floats, lasts, grad)
    if name == 'no_entry':
      self.assertFalse(any(a.any() for a in wanted))
      out, pull = jax.vjp(operation(lasts), *floats)
      self.assertFalse(any(a.any() for a in (out, *pull(grad))))
      return
    by_hand.check(operation(lasts), floats, grad, wanted)

  def test_the_gradients_by_hand_are_those_of_differences(self):
    floats, lasts, grad = small()
    floats = [np.asarray(a, np.float64) for a in floats]
    rng = np.random.default_rng(1)
    along = [rng.normal(size=a.shape) for a in floats]

    def total(step):
      moved = [a + step * d for a, d in zip(floats, along)]
      return (in_float64(moved, lasts, grad)[0] * np.asarray(grad)).sum()

    found = (total(1e-5) - total(-1e-5)) / 2e-5
    _, *grads = in_float64(floats, lasts, grad)
    want = sum((g * d).sum() for g, d in zip(grads, along))
    self.assertAlmostEqual(found / want, 1, places=6)

  def test_places_are_windows_of_whole_documents(self):
    at, before = places(TEST['index_keys'])
    np.testing.assert_array_equal(at, [[3, 7, 15, -1], [3, 7, 11, -1]])
    np.testing.assert_array_equal(before, [[-1, 3, -1, -1], [-1, 3, 7, -1]])

  def test_gates_of_any_size_weigh_as_their_differences_do(self):
    (kv, gate, bias), lasts, _ = small()
    run = jax.jit(lambda gate: operation(lasts)(kv, gate, bias))
    # Whole numbers and halves, so that a large one more is exact.
    gate, bias = jnp.round(gate * 2) / 2, jnp.zeros_like(bias)
    for large in (2.0**16, -(2.0**16)):
      np.testing.assert_array_equal(run(gate + large), run(gate))
    # One token far ahead is all; equal ones are a mean.
    got = run(gate.at[:, 2].set(1e8))
    np.testing.assert_array_equal(got[:, 0], kv[:, 2, 1])
    got = run(jnp.full_like(gate, 1e30))
    np.testing.assert_allclose(got[1, 1], kv[1, 4:, 1].mean(0), rtol=1e-5)
    both = jnp.concatenate([kv[0, :4, 0], kv[0, 4:, 1]])
    np.testing.assert_allclose(got[0, 1], both.mean(0), rtol=1e-5)

  def test_what_belongs_to_no_entry_neither_counts_nor_has_a_gradient(self):
    floats, (at, before), grad = draw(TEST['index_keys'])
    kv, gate, bias = floats
    used = np.zeros(kv.shape[:3], bool)
    for b, s in zip(*np.nonzero(at >= 0)):
      used[b, at[b, s] - 3 : at[b, s] + 1, 1] = True
      if before[b, s] >= 0:
        used[b, before[b, s] - 3 : before[b, s] + 1, 0] = True
    self.assertFalse(used.all())
    spoiled = [jnp.where(used[..., None], a, jnp.nan) for a in (kv, gate)]
    run = operation((at, before))
    np.testing.assert_array_equal(run(*spoiled, bias), run(*floats))
    _, pull = jax.vjp(run, *spoiled, bias)
    for got in pull(grad)[:2]:
      self.assertTrue(np.isfinite(got).all())
      self.assertFalse(np.asarray(got)[~used].any())
      self.assertTrue(np.asarray(got)[used].any(axis=-1).all())

  def test_windows_beyond_the_row_are_no_entries(self):
    (kv, gate, bias), (at, before), _ = small()
    out = operation((jnp.asarray([[2, 8], [-5, 7]]), before))(kv, gate, bias)
    self.assertFalse(out[0].any() or out[1, 0].any())
    self.assertTrue(out[1, 1].any())
    # A window before that is none: as without one.
    run = lambda before: operation((at, jnp.asarray(before)))(kv, gate, bias)
    none = run([[-1, -1], [-1, -1]])
    np.testing.assert_array_equal(run([[2, 2], [8, 99]]), none)

  def test_the_kernel_zeros_just_what_no_entry_writes(self):
    for shape in TEST.values():
      floats, lasts, grad = draw(shape)
      B, L, J, _ = floats[0].shape
      at, *before = map(jnp.asarray, lasts)
      rows = gpu._lasts(at, *(before or [None]), L)
      found = gpu._belongs(rows, shape.ratio, B * L).reshape(B, L, J)
      full = np.ones_like(grad)  # a gradient that no weight hides
      flat = (jnp.zeros_like(a) for a in floats)
      _, dkv, _, _ = in_float64(tuple(flat), lasts, full)
      np.testing.assert_array_equal(found, dkv[..., 0] > 0)

  def test_bad_input_is_answered_in_a_line(self):
    (kv, gate, bias), (at, before), _ = small()
    for args, message in (
      ((kv[0], gate[0], bias, at, before), r'kv is \[8, 2, 128\] and gate'),
      ((kv, gate[:, 1:], bias, at, before), r'gate \[2, 7, 2, 128\], not both'),
      ((kv, gate, bias[:, 1:], at, before), r'bias is \[4, 1, 128\], but kv'),
      ((kv, gate, bias, at[0], before), r'at is \[2\], but kv'),
      ((kv, gate, bias, at), '2 series: `before` is for two'),
      ((kv, gate, bias, at, before[:, 1:]), r'before is \[2, 1\], at \[2, 2\]'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        compress(*args)
    one = [a[..., :1, :] for a in (kv, gate, bias)]
    with self.assertRaisesRegex(ValueError, '1 series: `before` is for two'):
      compress(*one, at, before)
    narrow = [a[..., :100] for a in (kv, gate, bias)]
    with self.assertRaisesRegex(NotImplementedError, 'width 100, not a multi'):
      compress(*narrow, at, before, impl='gpu')
    half = [a.astype(jnp.bfloat16) for a in (kv, gate, bias)]
    with self.assertRaisesRegex(NotImplementedError, 'dtype bfloat16, not'):
      compress(*half, at, before, impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'dtype bfloat16, not'):
      compress(kv, half[1], bias, at, before, impl='gpu')


if __name__ == '__main__':
  absltest.main()
