"""DeepSeek-V3.2 against transformers, and where that departs."""

import contextlib
import tempfile
from unittest import mock

import jax
import numpy as np
import parity_harness as ph
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.hf import (
  config_json,
  config_render,
  names,
  saving,
  ties,
  verify,
)
from deepseek_jax.model.attention import indexer
from deepseek_jax.model.attention.dsa import DSAConfig

CASES = {
  'yarn': {
    'rope_scaling': ph.yarn(mscale=1.0, mscale_all_dim=1.0),
    'n_shared_experts': 2,
  },
  'all_dims_differ': {
    'hidden_size': 36,
    'num_attention_heads': 3,
    'num_key_value_heads': 3,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 10,
    'v_head_dim': 9,
    'index_n_heads': 21,
    'index_head_dim': 13,
    'index_topk': 3,
    'n_group': 1,
    'topk_group': 1,
  },
  'rope_fills_the_indexer': {'index_head_dim': 8, 'index_topk': 1},
  'dense_layers_tied': {
    'first_k_dense_replace': 3,
    'tie_word_embeddings': True,
  },
}


def _named(*cases):
  return parameterized.named_parameters((name, CASES[name]) for name in cases)


class ParityTest(parameterized.TestCase):
  def assert_equal(self, ours, theirs):
    self.assertGreater(theirs.std(), 0.1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ph.LOGITS_ATOL)

  @_named('rope_fills_the_indexer', 'dense_layers_tied')
  def test_logits_equal(self, fields):
    pair = ph.pair('v32', **fields)
    ids = ph.tokens(pair)
    self.assert_equal(ph.logits(pair, ids), ph.their_logits(pair, ids))

  @_named('yarn', 'all_dims_differ')
  def test_logits_and_gradient_of_every_parameter_equal(self, fields):
    """The model's loss teaches the indexer nothing, on either side."""
    pair = ph.pair('v32', num_hidden_layers=2, **fields)
    ids = ph.tokens(pair)
    logits, ours = ph.gradients(pair, ids)
    self.assert_equal(logits, ph.their_logits(pair, ids))
    theirs = ph.their_gradients(pair, ids)
    buffers = {n for n in ours if n.endswith('e_score_correction_bias')}
    self.assertEqual(set(ours) - buffers, set(theirs))
    for name, grad in theirs.items():
      np.testing.assert_allclose(
        ours[name], grad, rtol=0, atol=ph.GRAD_ATOL, err_msg=name
      )
      if 'indexer' in name:
        self.assertEqual(np.abs(ours[name]).max(), 0, name)
    self.assertGreater(max(np.abs(g).max() for g in theirs.values()), 1e-2)

  def test_cached_decoding_equals(self):
    pair = ph.pair('v32', num_hidden_layers=2)
    ids = ph.tokens(pair, length=12)
    theirs = ph.their_decoded(pair, ids, prompt=5)
    self.assert_equal(ph.decoded(pair, ids, prompt=5), theirs)


class MistakesTest(parameterized.TestCase):
  """Published bugs of other ports: parity fails when ours has them."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pair = ph.pair('v32', num_hidden_layers=1, first_k_dense_replace=1)
    cls.ids = ph.tokens(cls.pair)
    cls.theirs = ph.their_logits(cls.pair, cls.ids)

  def assert_differs(self, pair):
    gap = np.abs(ph.logits(pair, self.ids) - self.theirs).max()
    self.assertGreater(gap, 100 * ph.LOGITS_ATOL)

  def test_interleaved_rope_in_the_indexer(self):
    self.assert_differs(
      ph.changed(self.pair, {'attention.indexer.interleaved': True})
    )

  def test_rope_on_the_last_dims_of_the_indexer(self):
    def rotated(self, x, positions):
      at = x.shape[-1] - self.rope_dim
      last = indexer.rope(x[..., at:], positions, self.rope)
      return jax.numpy.concatenate([x[..., :at], last], axis=-1)

    with mock.patch.object(indexer.Indexer, '_rotated', rotated):
      self.assert_differs(self.pair)

  def test_key_norm_without_its_bias(self):
    variables = jax.tree.map(lambda a: a, self.pair.variables)
    layer = variables['params']['segments'][0][0]['attention']
    norm = layer['indexer']['k_norm']
    norm['bias'] = 0 * norm['bias']
    self.assert_differs(self.pair._replace(variables=variables))

  def test_dense_attention(self):
    self.assert_differs(ph.changed(self.pair, {'attention.stage': 'dense'}))


class DepartureTest(absltest.TestCase):
  def test_ties_fall_alike_in_prefill_and_decoding_here_but_not_there(self):
    """torch.topk takes any of equal scores, and others for other lengths.

    With weights of zero every score is equal: ours reads the lowest places,
    and decoding equals the forward pass. Theirs differs from itself.
    """
    fields = {'num_hidden_layers': 1, 'first_k_dense_replace': 1}
    theirs = ph.make_theirs('v32', index_topk=4, **fields)
    with ph.torch.no_grad():
      theirs.model.layers[0].self_attn.indexer.weights_proj.weight.zero_()
    with tempfile.TemporaryDirectory() as folder:
      theirs.save_pretrained(folder)
      pair = ph.Pair(theirs, *hf.load(folder))
    ids = ph.tokens(pair, length=40)
    whole = ph.logits(pair, ids)
    np.testing.assert_allclose(
      ph.decoded(pair, ids, prompt=20), whole, rtol=0, atol=ph.LOGITS_ATOL
    )
    gap = ph.their_decoded(pair, ids, prompt=20) - ph.their_logits(pair, ids)
    self.assertGreater(np.abs(gap).max(), 0.01)

  def test_the_indexer_learns_here_and_never_there(self):
    """transformers runs it without gradients; its loss is not there either."""
    pair = ph.pair('v32', num_hidden_layers=1, first_k_dense_replace=1)
    ids = ph.tokens(pair)
    ph.their_gradients(pair, ids)
    layer = pair.theirs.model.layers[0].self_attn
    self.assertIsNone(layer.indexer.wk.weight.grad)
    model = ds.build(pair.config)

    def loss(params):
      variables = {**pair.variables, 'params': params}
      out = model.apply(variables, ids, train=True)
      return out.aux['segments'][0][0]['attention']['loss'].sum()

    grads = ph.jit(jax.grad(loss))(pair.variables['params'])
    own = grads['segments'][0][0]['attention']['indexer']['k']
    self.assertGreater(float(np.abs(own).max()), 1e-4)


class FilesTest(parameterized.TestCase):
  def test_published_number_of_tensors_and_weights(self):
    """92,425 tensors with scales, and 685.36 billion weights; MTP included."""
    listed = saving.stored(ds.presets.v32(), saving.Format('bfloat16', 'fp8'))
    tensors = {k: v for one in listed for k, v in one.tensors().items()}
    self.assertLen(tensors, 92_425)
    count = sum(int(np.prod(one.part.leaf.theirs)) for one in listed)
    self.assertEqual(count, 685_355_329_792)
    for layer in (0, 60, 61):
      at = f'model.layers.{layer}.self_attn.indexer.'
      shapes = {
        'wq_b.weight': (8192, 1536),
        'wq_b.weight_scale_inv': (64, 12),
        'wk.weight': (128, 7168),
        'k_norm.weight': (128,),
        'k_norm.bias': (128,),
        'weights_proj.weight': (64, 7168),
      }
      for name, shape in shapes.items():
        self.assertEqual(tensors[at + name][1], shape)
      self.assertNotIn(at + 'weights_proj.weight_scale_inv', tensors)

  def test_every_tensor_is_one_slice(self):
    for leaf in names.leaves(ds.presets.v32()):
      parts = list(names.parts(leaf))
      total = len(parts) * int(np.prod(leaf.theirs))
      self.assertEqual(total, int(np.prod(leaf.shape)), leaf.name)

  def test_config_json_goes_round(self):
    config = ds.presets.v32()
    fields = config_render.render(config)
    self.assertEqual(fields['model_type'], 'deepseek_v32')
    self.assertEqual(fields['index_topk'], 2048)
    again = config_json.parse(fields).config
    self.assertEqual(again.attention, config.attention)
    self.assertEqual(again.moe.router, config.moe.router)
    self.assertEqual(again.mtp, config.mtp)

  @parameterized.parameters(
    ({'index_topk': None}, 'index_topk'),
    ({'index_topk': '9'}, "index_topk = '9': must be int"),
    ({'q_lora_rank': None}, 'q_lora_rank = None: must be int'),
    ({'rope_interleave': False}, 'rope_interleave = False: not supported'),
    ({'mlp_layer_types': ['sparse'] * 61}, 'mlp_layer_types'),
    ({'layer_types': ['full_attention'] * 61}, 'layer_types'),
  )
  def test_fields_that_mean_something_else_are_refused(self, change, message):
    fields = config_render.render(ds.presets.v32()) | change
    with self.assertRaisesRegex(ds.InputError, message):
      config_json.parse(fields)

  @parameterized.parameters(
    ('attention.stage', 'dense'),
    ('attention.indexer.interleaved', True),
    ('attention.rope.interleaved', False),
    ('attention.q_rank', None),
  )
  def test_what_files_cannot_say_is_refused(self, field, value):
    config = ds.changed(ds.presets.v32_tiny(), {field: value})
    with self.assertRaisesRegex(ds.InputError, field.replace('.', r'\.')):
      config_render.render(config)

  def test_saved_files_are_read_by_transformers_also_from_float8(self):
    pair = ph.pair('v32', num_hidden_layers=2)
    self.assertIsInstance(pair.config.attention, DSAConfig)
    with tempfile.TemporaryDirectory() as folder:
      hf.save(folder, pair.config, pair.variables)
      again = ph.transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation='eager'
      ).eval()
      for name, p in pair.theirs.named_parameters():
        q = dict(again.named_parameters())[name]
        np.testing.assert_array_equal(p.detach(), q.detach(), err_msg=name)
    with tempfile.TemporaryDirectory() as folder:
      hf.save(folder, pair.config, pair.variables, quantize='fp8')
      config, variables = hf.load(folder)
      self.assertEqual(config.attention, pair.config.attention)
    a, b = (
      v['params']['segments'][0][0]['attention']['indexer']
      for v in (variables, pair.variables)
    )
    for name in ('q', 'k'):
      scale = np.abs(b[name]).max()
      np.testing.assert_allclose(a[name], b[name], atol=0.07 * scale)
      self.assertGreater(np.abs(a[name] - b[name]).max(), 0)
    np.testing.assert_array_equal(a['weights'], b['weights'])

  def test_the_certificate_passes(self):
    fields = {'num_hidden_layers': 2, **CASES['yarn']}
    theirs = ph.make_theirs('v32', **fields)
    with tempfile.TemporaryDirectory() as folder:
      theirs.save_pretrained(folder)
      certificate = verify.certify(folder, lengths=(1, 9))
    self.assertTrue(certificate['passed'], certificate['cases'])

  def test_the_certificate_breaks_ties_alike_and_counts_them(self):
    theirs = ph.make_theirs('v32', index_topk=4, num_hidden_layers=1)
    with ph.torch.no_grad():
      # Every score is 0. Trained indexers have many: sums of ReLUs.
      theirs.model.layers[0].self_attn.indexer.weights_proj.weight.zero_()
    plain = contextlib.nullcontext({'tied': 0})
    with tempfile.TemporaryDirectory() as folder:
      theirs.save_pretrained(folder)
      certificate = verify.certify(folder, lengths=(65,))
      with mock.patch.object(ties, 'lowest_first', lambda: plain):
        without = verify.certify(folder, lengths=(65,))
    self.assertTrue(certificate['passed'], certificate['cases'])
    self.assertGreater(max(c['tied'] for c in certificate['cases']), 0)
    self.assertFalse(without['passed'])


if __name__ == '__main__':
  absltest.main()
