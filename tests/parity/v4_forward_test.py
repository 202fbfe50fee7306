"""V4: logits, gradients, decoding and files equal those of transformers."""

import dataclasses
import json
import os
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity_harness as ph
import pytest
import v4_harness as v4
from absl.testing import absltest, parameterized
from safetensors.numpy import load_file, save_file

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.hf import config_fields, safetensors_io, verify
from deepseek_jax.hf.families import v4_names

YARN = {
  'type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 16,
  'beta_fast': 4,
  'beta_slow': 1,
}
# Each case departs from the base in what its name says.
CASES = {
  'base': {},
  'csa_yarn_odd_dims': {
    'layer_types': [v4.CSA, v4.CSA],
    'mlp_layer_types': ['moe', 'moe'],
    'num_hidden_layers': 2,
    'rope_scaling': YARN,
    'num_attention_heads': 6,
    'o_groups': 3,
    'head_dim': 12,
    'qk_rope_head_dim': 4,
    'q_lora_rank': 7,
    'sliding_window': 3,
    'hc_mult': 2,
    'swiglu_limit': 0.5,
    'routed_scaling_factor': 2.5,
  },
  'hca_window_of_1_sigmoid': {
    'layer_types': [v4.HCA, v4.SLIDING],
    'mlp_layer_types': ['hash_moe', 'hash_moe'],
    'num_hidden_layers': 2,
    'compress_rates': {v4.CSA: 4, v4.HCA: 3},
    'sliding_window': 1,
    'scoring_func': 'sigmoid',
    'hc_sinkhorn_iters': 3,
    'hc_eps': 1e-3,
    'rms_norm_eps': 1e-4,
  },
}


def jitted(pair):
  model = ds.build(pair.config)
  return model, ph.jit(lambda v, t, c: model.apply(v, t, cache=c))


class ParityTest(parameterized.TestCase):
  def assert_logits_equal(self, ours, theirs):
    self.assertGreater(theirs.std(), 0.1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ph.LOGITS_ATOL)

  def test_logits_and_gradients_equal(self):
    self.assert_all_equal(CASES['csa_yarn_odd_dims'])

  @parameterized.parameters('base', 'hca_window_of_1_sigmoid')
  @pytest.mark.slow
  def test_all_kinds_of_layers_equal_and_decode(self, name):
    self.assert_all_equal(CASES[name])

  def assert_all_equal(self, fields):
    pair = v4.pair(**fields)
    ids = ph.tokens(pair, length=27)
    logits, ours = ph.gradients(pair, ids)
    theirs = ph.their_logits(pair, ids)
    self.assert_logits_equal(logits, theirs)
    grads = v4.original(ph.their_gradients(pair, ids))
    buffers = {n for n in ours if n.endswith(('gate.bias', 'tid2eid'))}
    self.assertEqual(set(ours) - buffers, set(grads))
    for name, grad in grads.items():
      np.testing.assert_allclose(
        ours[name], grad, rtol=0, atol=ph.GRAD_ATOL, err_msg=name
      )
    self.assertGreater(max(np.abs(g).max() for g in grads.values()), 1e-2)
    if pair.config.layers == 3:
      got = ph.decoded(pair, ids, prompt=18)
      self.assert_logits_equal(got, ph.their_decoded(pair, ids, prompt=18))
      self.assert_logits_equal(got, theirs)


class FileTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_both_name_sets_and_their_mixture_are_the_same_model(self):
    theirs = v4.make_theirs()
    with tempfile.TemporaryDirectory() as folder:
      theirs.save_pretrained(folder)  # the mixture
      config, mixed = hf.load(folder)
      file = os.path.join(folder, 'model.safetensors')
      state = {k: v.numpy() for k, v in theirs.state_dict().items()}
      self.assertIn('model.layers.1.mlp.experts.gate_up_proj', state)
      save_file(state, file)
      _, modern = hf.load(folder)
      names = {v4_names.original(k): v for k, v in load_file(file).items()}
      self.assertIn('layers.1.attn.indexer.compressor.ape', names)
      save_file(v4.original(state), file)
      _, old = hf.load(folder)
    for other in (modern, old):
      jax.tree.map(np.testing.assert_array_equal, mixed, other)
    self.assertEqual(config.mtp.depth, 0)
    table = mixed['buffers']['segments'][0][0]['ffn']['router']['table']
    self.assertEqual(table.dtype, jnp.int32)

  @pytest.mark.slow
  def test_transformers_reads_what_we_write(self):
    config = ds.presets.v4_tiny()
    config = ds.changed(
      dataclasses.replace(
        config,
        dim=24,
        vocab_size=61,
        kinds=ds.presets.v4_kinds(61),
        layout=config_fields.compact(['window_hash', 'csa', 'hca']),
      ),
      {
        'attention.q_rank': 12,
        'attention.csa.top_k': 3,
        'attention.csa.index_heads': 16,
        'attention.window': 5,
      },
    )
    model = ds.build(config)
    variables = model.init(jax.random.key(0))
    noise = lambda p: p + 0.2 * jax.random.normal(jax.random.key(1), p.shape)
    variables['params'] = jax.tree.map(noise, variables['params'])
    with tempfile.TemporaryDirectory() as folder:
      hf.save(folder, config, variables, extra={'eos_token_id': 7})
      again, same = hf.load(folder, mtp=True)
      self.assertEqual(again.segments(), config.segments())
      jax.tree.map(np.testing.assert_array_equal, same, variables)
      certificate = verify.certify(folder, lengths=(5, 27))
    self.assertTrue(certificate['passed'], certificate['cases'])
    self.assertLen(certificate['cases'][0]['layers'], 3)

  def test_quantised_weights_are_dequantised(self):
    theirs = v4.make_theirs()
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
      theirs.save_pretrained(folder)
      file = os.path.join(folder, 'model.safetensors')
      state = v4.original(
        {k: v.numpy() for k, v in theirs.state_dict().items()}
      )
      fp8 = 'layers.1.attn.wq_b.weight'
      values = rng.normal(size=state[fp8].shape).astype(ml_dtypes.float8_e4m3fn)
      scale = np.full((1, 1), 0.25).astype(ml_dtypes.float8_e8m0fnu)
      want = {fp8: values.astype(np.float32) * 0.25}
      tensors = {fp8: values, 'layers.1.attn.wq_b.scale': scale}
      for e in range(6):  # [12, 24] numbers: the last block of 32 is short
        name = f'layers.1.ffn.experts.{e}.w1.weight'
        codes = rng.integers(0, 16, (12, 24)).astype(np.uint8)
        powers = 2.0 ** rng.integers(-3, 3, (12, 1))
        sign = np.where(codes & 8, -1, 1)
        want[name] = np.float32(sign * grid[codes & 7] * powers)
        tensors[name] = (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int8)
        tensors[name.replace('weight', 'scale')] = powers.astype(
          ml_dtypes.float8_e8m0fnu
        )
      fields = {
        'quant_method': 'fp8',
        'fmt': 'e4m3',
        'activation_scheme': 'dynamic',
        'scale_fmt': 'ue8m0',
        'weight_block_size': [128, 128],
      }
      _write(file, {**state, **tensors})
      _edit(folder, quantization_config=fields, expert_dtype='fp4')
      _, variables = hf.load(folder)
      _write(file, {**state, **want})
      _, plain = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, variables, plain)

  def test_released_fields_mean_the_same_pattern(self):
    ours = v4.pair(rope_scaling=YARN).config
    fields = {
      k: v
      for k, v in v4.BASE.items()
      if not k.endswith(('implementation', 'types', 'rates'))
    }
    fields |= {
      'model_type': 'deepseek_v4',
      'compress_ratios': [0, 4, 8, 0],
      'compress_rates': v4.BASE['compress_rates'],
      'num_hash_layers': 1,
      'n_shared_experts': 1,
      'hc_mult': 4,
      'hc_sinkhorn_iters': 20,
      'hc_eps': 1e-6,
      'rms_norm_eps': 1e-6,
      'swiglu_limit': 10.0,
      'routed_scaling_factor': 1.5,
      'rope_scaling': YARN,
    }
    parsed = hf.config_json.parse(fields).config
    self.assertEqual(parsed.segments(), ours.segments())
    self.assertEqual(parsed.attention, ours.attention)
    with self.assertRaisesRegex(ds.InputError, 'compress_ratios: missing'):
      hf.config_json.parse({**fields, 'compress_ratios': None})
    with self.assertRaisesRegex(ds.InputError, 'hc_mult: missing'):
      hf.config_json.parse({k: fields[k] for k in fields if k != 'hc_mult'})
    with self.assertRaisesRegex(ds.InputError, 'ratio_of_index = 2: not under'):
      hf.config_json.parse({**fields, 'ratio_of_index': 2})

  def test_the_dense_stage_is_not_in_files(self):
    dense = ds.changed(ds.presets.v4_tiny(), {'attention.csa.stage': 'dense'})
    with self.assertRaisesRegex(ds.InputError, "csa.stage = 'dense': files"):
      hf.config_render.render(dense)

  @parameterized.parameters('v4_flash', 'v4_pro')
  def test_released_models_survive_their_config_json(self, name):
    config = getattr(ds.presets, name)()
    fields = hf.config_render.render(config)
    again = hf.config_json.parse(fields).config
    self.assertEqual(again, config)
    leaves = hf.names.leaves(config)
    shapes = {
      p.name: leaf.theirs for leaf in leaves for p in hf.names.parts(leaf)
    }
    d = config.dim
    self.assertEqual(shapes['layers.4.hc_attn_fn'], (24, 4 * d))
    self.assertEqual(shapes['layers.4.attn.compressor.ape'], (4, 1024))
    self.assertEqual(shapes['layers.3.attn.compressor.wkv.weight'], (512, d))
    self.assertEqual(shapes['mtp.0.e_proj.weight'], (d, d))
    self.assertEqual(shapes['layers.2.ffn.gate.tid2eid'], (129280, 6))
    self.assertNotIn('layers.2.ffn.gate.bias', shapes)
    heads, groups = config.attention.heads, config.attention.groups
    self.assertEqual(
      shapes['layers.9.attn.wo_a.weight'],
      (groups * 1024, heads // groups * 512),
    )


def _write(file, tensors):
  """A safetensors file of any dtypes; numpy's own writer knows few."""
  listed = {k: (v.dtype, v.shape) for k, v in tensors.items()}
  writer = safetensors_io.Writer(file, listed)
  for name, value in tensors.items():
    writer.write(name, np.ascontiguousarray(value))
  writer.close()


def _edit(folder, **changes):
  path = os.path.join(folder, 'config.json')
  with open(path, encoding='utf-8') as file:
    fields = json.load(file) | changes
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(fields, file)


class DepartureTest(parameterized.TestCase):
  """Where transformers 5.23 is not the paper, and we are."""

  @pytest.mark.slow
  def test_equal_scores_choose_by_place_in_prefill_and_decoding(self):
    """Index weights of 0 make all scores 0: transformers' choice is its own."""
    pair = v4.pair(index_topk=2)
    name = 'indexer'
    with ph.torch.no_grad():
      for key, p in pair.theirs.named_parameters():
        if key.endswith('scorer.weights_proj.weight'):
          p.zero_()
    params = jax.tree.map(lambda a: a, pair.variables['params'])
    for block in params['segments'].values():
      for one in block.values():
        far = one['attention'].get('far', {})
        if name in far:
          far[name]['weights'] = far[name]['weights'] * 0
    pair = pair._replace(variables={**pair.variables, 'params': params})
    ids = ph.tokens(pair, length=27)
    whole = ph.logits(pair, ids)
    steps = ph.decoded(pair, ids, prompt=18)
    np.testing.assert_allclose(steps, whole, rtol=0, atol=ph.LOGITS_ATOL)
    # The lowest entries are chosen: forbidding the others changes nothing.
    theirs = ph.their_logits(pair, ids)
    self.assertGreater(np.abs(theirs - whole).max(), 1e-2)

  def test_connections_start_small_and_not_at_1(self):
    config = transformers_config()
    theirs = ph.transformers.DeepseekV4ForCausalLM(config)
    connection = theirs.model.layers[0].attn_hc
    self.assertEqual(connection.scale.tolist(), [1.0, 1.0, 1.0])
    self.assertEqual(connection.base.abs().max().item(), 0.0)
    ours = ds.presets.v4_tiny().residual
    self.assertEqual((ours.alpha, ours.diagonal), (0.01, 1.0))

  @pytest.mark.slow
  def test_the_indexer_never_sees_the_future(self):
    """Transformers before 5.23 let it: the scores were not masked."""
    pair = v4.pair()
    ids = ph.tokens(pair, length=27)
    run = ph.jit(
      lambda t: ds.build(pair.config).apply(pair.variables, t).logits
    )
    whole = run(ids)
    for t in (7, 8, 15, 16, 20):
      changed = ids.copy()
      changed[:, t:] = (changed[:, t:] + 1) % 61
      np.testing.assert_array_equal(run(changed)[:, :t], whole[:, :t])


def transformers_config():
  return ph.transformers.DeepseekV4Config(**v4.BASE)


if __name__ == '__main__':
  absltest.main()
