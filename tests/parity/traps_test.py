"""Known mistakes of implementations: parity fails when ours makes them.

And where transformers departs from the paper or the released code, both
results, with the field of ours that chooses.
"""

import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import parity_harness as ph
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.hf import fp8
from deepseek_jax.model.attention import mla
from deepseek_jax.model.experts import router

_CHOOSE, _LIMIT = router.choose, router.limit_groups
_YARN = {'rope_scaling': ph.yarn(mscale=0.7, mscale_all_dim=1.3)}


def _masked_with_zero(choice, cfg):
  """transformers before 5.23 (transformers#45440)."""
  limited = _LIMIT(choice, cfg)
  return jnp.where(jnp.isneginf(limited), 0.0, limited)


def _bias_in_weights(scores, bias, top_k, cfg):
  return _CHOOSE(scores + bias, None, top_k, cfg)


def _bias_dropped(scores, bias, top_k, cfg):
  del bias
  return _CHOOSE(scores, None, top_k, cfg)


def _mutants():
  at = mock.patch.object
  return {
    'masked_groups_score_zero': at(router, 'limit_groups', _masked_with_zero),
    'bias_in_the_weights': at(router, 'choose', _bias_in_weights),
    'bias_dropped': at(router, 'choose', _bias_dropped),
    'mscale_left_out_of_softmax': at(mla, 'softmax_multiplier', lambda _: 1.0),
  }


_SETTINGS = {
  'other_rope_layout': {'attention.rope.interleaved': False},
  'group_score_of_v2': {'moe.router.group_score': 'max'},
  'weights_not_normalized': {'moe.router.normalize': False},
  'weights_not_scaled': {'moe.router.scale': 1.0},
  'latent_norm_eps_of_the_blocks': {'attention.norm_eps': 0.1},
  'block_norm_eps_of_the_latents': {'norm_eps': 1e-6},
  'mscale_left_out_of_the_table': {
    'attention.rope.scaling.attention_factor': 1.0
  },
}


class MistakesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # A large eps: the latent norms must keep their own 1e-6.
    cls.pair = ph.pair('v3', rms_norm_eps=0.1, num_hidden_layers=2, **_YARN)
    cls.ids = ph.tokens(cls.pair)
    cls.theirs = ph.their_logits(cls.pair, cls.ids)

  def assert_differs(self, pair):
    gap = np.abs(ph.logits(pair, self.ids) - self.theirs).max()
    self.assertGreater(gap, 1000 * ph.LOGITS_ATOL)

  def test_without_a_mistake_logits_equal(self):
    ours = ph.logits(self.pair, self.ids)
    np.testing.assert_allclose(ours, self.theirs, rtol=0, atol=ph.LOGITS_ATOL)

  @parameterized.parameters(*_mutants())
  def test_parity_sees_wrong_code(self, name):
    with _mutants()[name]:
      self.assert_differs(self.pair)

  @parameterized.parameters(*_SETTINGS)
  def test_parity_sees_wrong_setting(self, name):
    self.assert_differs(ph.changed(self.pair, _SETTINGS[name]))


class DepartureTest(absltest.TestCase):
  def test_v2_norm_topk_prob_normalizes_here_and_does_nothing_there(self):
    """The released V2 code divides by the sum in place of scaling.

    moe.router.normalize and moe.router.scale hold what the file means; with
    normalize off and the scale of the file, transformers' result comes back.
    """
    pair = ph.pair('v2', norm_topk_prob=True, routed_scaling_factor=3.0)
    ids = ph.tokens(pair)
    self.assertTrue(pair.config.moe.router.normalize)
    self.assertEqual(pair.config.moe.router.scale, 1.0)
    theirs = ph.their_logits(pair, ids)
    self.assertGreater(np.abs(ph.logits(pair, ids) - theirs).max(), 0.01)
    as_theirs = ph.changed(
      pair, {'moe.router.normalize': False, 'moe.router.scale': 3.0}
    )
    np.testing.assert_allclose(
      ph.logits(as_theirs, ids), theirs, rtol=0, atol=ph.LOGITS_ATOL
    )

  def test_ragged_float8_blocks_start_at_multiples_of_128(self):
    """transformers takes the block size from the number of blocks.

    Equal where 128 divides the shape. Else it reads other numbers than were
    stored, or, as for V3's 576 rows, nothing; ours has no option for that.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    read = Fp8Dequantize(None)._dequantize_one
    draw = np.random.default_rng(0)
    for rows, equal in ((256, True), (200, False)):
      weight = draw.standard_normal((rows, 128)).astype(np.float32)
      weight *= np.linspace(0.1, 10, rows)[:, None]
      quantized, scale = fp8.quantize(weight)
      ours = fp8.dequantize(quantized, scale)
      np.testing.assert_allclose(ours, weight, rtol=0.07, atol=0.1)
      bits = ph.torch.tensor(quantized.view(np.uint8))
      theirs = read(
        bits.view(ph.torch.float8_e4m3fn),
        ph.torch.tensor(scale),
        ph.torch.float32,
      )
      self.assertEqual(np.array_equal(theirs.numpy(), ours), equal)
    with self.assertRaisesRegex(ValueError, 'not divisible'):
      read(ph.torch.ones(576, 128), ph.torch.ones(5, 1))

  def test_mtp_order_follows_the_checkpoints_not_the_paper(self):
    """The paper writes [hidden; embedding], eh_proj takes the reverse.

    `merge` is in the order of the checkpoints; rolled by D it is the paper's.
    """
    config, variables, theirs, ids = _mtp()
    D = config.dim
    ours = _mtp_hidden(config, variables, ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ph.LOGITS_ATOL)
    merge = variables['params']['mtp'][0]
    merge['merge'] = jnp.roll(merge['merge'], D, axis=0)
    paper = _mtp_hidden(config, variables, ids)
    self.assertGreater(np.abs(paper - theirs).max(), 0.1)


def _mtp():
  """A V3 with a MTP layer, written by us and read by transformers."""
  from transformers.modeling_layers import MtpModel

  config = ds.changed(ph.pair('v3').config, {'mtp.depth': 1})
  variables = random_variables(config)
  ids = np.random.default_rng(5).integers(0, config.vocab_size, (2, 16))
  with tempfile.TemporaryDirectory() as folder:
    hf.save(folder, config, variables)
    main = ph.transformers.DeepseekV3ForCausalLM.from_pretrained(
      folder, attn_implementation='eager'
    ).eval()
    # transformers looks for MTP weights in layer 61 alone.
    main._keys_to_ignore_on_load_unexpected = [r'model\.layers\.3\..*']
    mtp = MtpModel.from_pretrained(main).eval()
  with ph.torch.no_grad():
    t = ph.torch.tensor(ids)
    hidden = main.model(t).last_hidden_state
    positions = ph.torch.arange(1, 16)[None]
    out = mtp.forward_layer(
      0, hidden[:, :-1], positions, None, input_ids=t[:, 1:]
    )
  return config, variables, out.numpy(), ids


def _mtp_hidden(config, variables, ids):
  model = ds.build(config)
  run = ph.jit(lambda v, t: model.apply(v, t, mtp=True).aux['mtp_hidden'][0])
  return np.asarray(run(variables, ids))[:, :-1]


def random_variables(config):
  """No norm of one, no bias of zero."""
  shapes = jax.eval_shape(ds.build(config).init, jax.random.key(0))
  draw = np.random.default_rng(0)

  def one(a):
    noise = 0.2 * draw.standard_normal(a.shape, np.float32)
    return jnp.asarray(noise + (a.ndim == 1))

  return jax.tree.map(one, shapes)


if __name__ == '__main__':
  absltest.main()
