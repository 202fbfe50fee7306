"""Where documents meet, entries draw on their own document alone."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from deepseek_jax.model.attention.compressor import Compressor, CompressorConfig
from deepseek_jax.model.attention.rope import RopeConfig
from deepseek_jax.model.context import Context
from tests import tiny

DIM, RATIO = 6, 3
CONFIG = CompressorConfig(
  ratio=RATIO,
  overlap=True,
  dim=4,
  rope_dim=2,
  rope=RopeConfig(),
  norm_eps=1e-6,
)


def entries(x, lengths):
  """Of documents [T D] that lie one after the other."""
  module = Compressor(CONFIG, DIM, std=1.0, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  weights = tiny.fill(nnx.to_pure_dict(state))
  positions = np.concatenate([np.arange(n) for n in lengths])[None]
  segments = np.repeat(np.arange(len(lengths)) + 1, lengths)[None]
  ctx = Context(None, jnp.asarray(positions), jnp.asarray(segments))
  run = jax.jit(lambda w, x: nnx.merge(graphdef, w)(x, ctx, None)[0])
  return np.asarray(run(weights, jnp.asarray(x[None], jnp.float32)))[0]


class DocumentsTest(parameterized.TestCase):
  # A document that ends with a window is followed by no gap: only its number
  # tells the next one's first window from its own second.
  @parameterized.parameters(2 * RATIO, 2 * RATIO + 1)
  def test_a_document_is_compressed_as_if_it_were_alone(self, first):
    second = 3 * RATIO
    x = np.random.default_rng(0).normal(size=(first + second, DIM))
    both = entries(x, (first, second))
    alone = entries(x[first:], (second,))
    np.testing.assert_allclose(both[2:5], alone[:3], atol=1e-6)
    # Within a document the second window does draw on the first.
    other = x[first:].copy()
    other[0] += 1
    moved = np.abs(entries(other, (second,)) - alone[:3]).max(axis=-1)
    self.assertGreater(moved[:2].min(), 1e-3)
    self.assertLess(moved[2], 1e-6)


if __name__ == '__main__':
  absltest.main()
