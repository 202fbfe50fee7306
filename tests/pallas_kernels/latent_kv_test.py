"""latent_kv against loops over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import latent_kv as op
from pallas_kernels.latent_kv.shapes import TEST

C, R, EPS = 128, 8, 1e-5


def draw(shape, seed=0):
  """x, w, gain, cos, sin, slots (one outside where there is room), cache."""
  rng = np.random.default_rng(seed)
  N, size = shape.tokens, (shape.pages, shape.page)
  normal = lambda *s: rng.normal(size=s).astype(np.float32)
  angles = rng.uniform(0, 2 * np.pi, (N, R // 2)).astype(np.float32)
  slots = rng.permutation(shape.pages * shape.page)[:N].astype(np.int32)
  if N > 2:
    slots[1], slots[2] = -1, shape.pages * shape.page
  arrays = normal(N, shape.dim), normal(shape.dim, C + R), normal(C)
  if shape.fp8:
    cache = op.FP8Pages(
      jnp.asarray(normal(*size, C), jnp.float8_e4m3fn),
      jnp.asarray(np.abs(normal(*size, C // 128))),
      jnp.asarray(normal(*size, R), jnp.bfloat16),
    )
  else:
    cache = op.Pages(normal(*size, C), normal(*size, R))
  return *arrays, np.cos(angles), np.sin(angles), slots, cache


def token(x, w, gain, cos, sin, interleaved):
  """Latent and key of one token, channel pair by channel pair, in float64."""
  kv = x.astype(np.float64) @ w.astype(np.float64)
  c = kv[:C] / np.sqrt(np.mean(kv[:C] ** 2) + EPS) * gain
  k = np.zeros(R)
  for i in range(R // 2):
    one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + R // 2)
    a, b = kv[C + one], kv[C + two]
    k[one], k[two] = a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]
  return c, k


def run(shape, args):
  fn = jax.jit(
    lambda *a: op.latent_kv(*a, eps=EPS, interleaved=shape.interleaved)
  )
  return jax.tree.map(np.asarray, fn(*args))


class LatentKvTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_each_slot_gets_its_token_and_no_other_changes(self, shape):
    args = draw(shape)
    got = run(shape, args)
    flat = lambda a: np.asarray(a).reshape(-1, a.shape[-1])
    wide = lambda a: flat(a).astype(np.float64)
    latents = wide(got.c)
    if shape.fp8:
      latents = latents * np.repeat(flat(got.scales), 128, axis=1)
    untouched = np.ones(shape.pages * shape.page, bool)
    for n, slot in enumerate(args[5]):
      if not 0 <= slot < len(untouched):
        continue
      untouched[slot] = False
      x, w, gain, cos, sin = args[:5]
      c, k = token(x[n], w, gain, cos[n], sin[n], shape.interleaved)
      # float8: half a step of 2**-3, and of the smallest step below it.
      close = {'rtol': 2**-4, 'atol': np.abs(c).max() * 2**-10 / 448}
      close = close if shape.fp8 else {'rtol': 1e-5, 'atol': 1e-5}
      np.testing.assert_allclose(latents[slot], c, **close)
      near = 2**-8 if shape.fp8 else 1e-5
      np.testing.assert_allclose(wide(got.k_r)[slot], k, rtol=near, atol=1e-5)
    for new, old in zip(got, args[6]):
      np.testing.assert_array_equal(flat(new)[untouched], flat(old)[untouched])

  def test_the_floor_of_a_float8_cache_is_an_argument(self):
    name = next(n for n, shape in TEST.items() if shape.fp8)
    *arrays, cache = draw(TEST[name])
    arrays[2] = arrays[2] * 1e-7  # gain
    floors = {'published': {}, 'none': {'floor': 0.0}}
    scales = {
      name: op.latent_kv(*arrays, cache, eps=EPS, **floor).scales
      for name, floor in floors.items()
    }
    slot = divmod(int(arrays[5][0]), cache.c.shape[1])
    np.testing.assert_allclose(scales['published'][slot], 1e-4 / 448, rtol=1e-6)
    self.assertLess(float(scales['none'][slot].max()), 1e-6 / 448)
    with self.assertRaisesRegex(ValueError, 'floor = -1.0: must be 0'):
      op.latent_kv(*arrays, cache, floor=-1.0)

  def test_a_record_is_656_bytes_and_comes_back(self):
    rng = np.random.default_rng(0)
    cache = op.FP8Pages(
      jnp.asarray(rng.normal(size=(2, 4, 512)), jnp.float8_e4m3fn),
      jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32),
      jnp.asarray(rng.normal(size=(2, 4, 64)), jnp.bfloat16),
    )
    records = op.pack(cache)
    self.assertEqual(records.shape, (2, 4, 656))
    one = np.asarray(records[1, 2])
    np.testing.assert_array_equal(
      one[512:528].view(np.float32), cache.scales[1, 2]
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, b),
      op.unpack(records),
      cache,
    )

  def test_unsupported_kernel_shape_says_why(self):
    args = draw(TEST['ragged'])
    with self.assertRaisesRegex(NotImplementedError, 'dtype float32'):
      op.latent_kv(*args, impl='gpu')
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in args[:2]]
    cache = op.Pages(*(jnp.asarray(a, jnp.bfloat16) for a in args[6]))
    with self.assertRaisesRegex(NotImplementedError, 'latent 128 and rope 8'):
      op.latent_kv(*narrow, *args[2:6], cache, impl='gpu')

  def test_bad_input_names_the_field(self):
    args = draw(TEST['ragged'])
    with self.assertRaisesRegex(ValueError, r'slots is \[4\].*ask for \[13\]'):
      op.latent_kv(*args[:5], args[5][:4], args[6])
    with self.assertRaisesRegex(NotImplementedError, 'has no gradient'):
      jax.grad(lambda x: op.latent_kv(x, *args[1:]).c.sum())(args[0])


if __name__ == '__main__':
  absltest.main()
