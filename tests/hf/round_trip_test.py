import dataclasses
import json
import os
import tempfile
from pathlib import Path

import chex
import hf_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import load_file, save_file

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.hf import safetensors_io, saving
from deepseek_jax.hf.source import Source


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.file = os.path.join(self.folder, 'model.safetensors')

  def saved(self, config=hf_models.V3, **options):
    variables = hf_models.variables(config)
    hf.save(self.folder, config, variables, **options)
    return variables

  def edit(self, change):
    tensors = {
      name: safetensors_io.read(entry)
      for name, entry in safetensors_io.read_header(self.file).items()
    }
    change(tensors)
    save_file(tensors, self.file)

  def edit_config(self, **fields):
    path = Path(self.folder, 'config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class RoundTripTest(FolderTest):
  @parameterized.parameters('v3', 'v2', 'llama', 'qwen3_moe')
  def test_float32_is_exact(self, family):
    config = hf_models.FAMILIES[family]
    variables = self.saved(config)
    loaded, back = hf.load(self.folder, mtp=True)
    chex.assert_trees_all_equal(back, variables)
    for ours in ('layout', 'attention', 'ffn', 'mtp', 'tied', 'norm_eps'):
      self.assertEqual(getattr(loaded, ours), getattr(config, ours), ours)

  def test_shards_hold_what_one_file_holds(self):
    config = hf_models.V3
    variables = hf_models.variables(config)
    self.saved()
    whole = load_file(self.file)
    with tempfile.TemporaryDirectory() as folder:
      read = saving._reader(
        {
          leaf.path: saving._array(variables, leaf)
          for leaf in saving.names.leaves(config)
        }
      )
      saving.write(
        folder, config, read, saving.Format('float32', shard_bytes=9000)
      )
      files = list(Path(folder).glob('model-*-of-*.safetensors'))
      self.assertGreater(len(files), 5)
      parts = {k: v for f in files for k, v in load_file(f).items()}
      chex.assert_trees_all_equal(parts, whole)
      chex.assert_trees_all_equal(hf.load(folder, mtp=True)[1], variables)
      # One file over many: the old index must not be read any more.
      hf.save(folder, config, variables)
      chex.assert_trees_all_equal(hf.load(folder, mtp=True)[1], variables)

  def test_bfloat16_keeps_norms_routers_and_biases_in_float32(self):
    variables = self.saved()
    config, back = hf.load(self.folder, dtype='bfloat16', mtp=True)
    self.assertEqual(config.compute.dtype, 'bfloat16')
    chex.assert_trees_all_equal(back['buffers'], variables['buffers'])
    block = back['params']['segments'][1][0]
    self.assertEqual(block['ffn']['router']['weight'].dtype, jnp.float32)
    self.assertEqual(block['attention_norm']['scale'].dtype, jnp.float32)
    self.assertEqual(block['ffn']['down'].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(
      back['params']['embed'], variables['params']['embed'].astype('bfloat16')
    )

  def test_bfloat16_file_keeps_selection_biases_in_float32(self):
    self.saved(dtype='bfloat16')
    kinds = {name: value.dtype for name, value in load_file(self.file).items()}
    biases = {n for n in kinds if n.endswith('correction_bias')}
    self.assertLen(biases, 3)
    for name, kind in kinds.items():
      wanted = np.float32 if name in biases else ml_dtypes.bfloat16
      self.assertEqual(kind, wanted, name)

  @parameterized.parameters('fp8', 'fp8_ue8m0')
  def test_float8_differs_by_a_quantisation_step_at_most(self, quantize):
    variables = self.saved(quantize=quantize)
    _, back = hf.load(self.folder, mtp=True)
    kept = lambda v: {k: v['params'][k] for k in ('embed', 'head', 'norm')}
    chex.assert_trees_all_equal(kept(back), kept(variables))
    block = lambda v: v['params']['segments'][1][0]
    chex.assert_trees_all_equal(
      block(back)['ffn']['router'], block(variables)['ffn']['router']
    )
    for name in ('gate_up', 'down'):
      a, b = block(back)['ffn'][name], block(variables)['ffn'][name]
      self.assertGreater(np.abs(a - b).max(), 0)
      # Half a step: 2^-4 of the number, 2^-10 scales near zero.
      top = np.abs(b).max() / 448 * (2 if quantize == 'fp8_ue8m0' else 1)
      limit = np.maximum(np.abs(b) * 2.0**-4, top * 2.0**-10)
      self.assertLessEqual((np.abs(a - b) / limit).max(), 1 + 1e-5)

  def test_mtp_layers_are_left_out_unless_asked_for(self):
    self.saved()
    config, variables = hf.load(self.folder)
    self.assertEqual(config.mtp.depth, 0)
    self.assertNotIn('mtp', variables['params'])
    unused = Source(self.folder).unused
    self.assertIn('model.layers.3.eh_proj.weight', unused)
    unused = Source(self.folder, mtp=True).unused
    copies = ('embed_tokens.weight', 'shared_head.head.weight')
    self.assertEqual(set(unused), {f'model.layers.3.{c}' for c in copies})
    self.assertIn('equals lm_head.weight', unused.values())

  def test_sharded_load_reads_what_it_holds(self):
    variables = self.saved()
    mesh = jax.make_mesh((1,), ('expert',))
    rules = {'experts': 'expert'}
    _, back = hf.load(self.folder, mtp=True, mesh=mesh, rules=rules)
    chex.assert_trees_all_equal(back, variables)
    source = Source(self.folder, mtp=True)
    leaf = next(
      x for x in source.leaves if x.name.endswith('segments.1.0.ffn.down')
    )
    whole = variables['params']['segments'][1][0]['ffn']['down']
    region = (slice(1, 2), slice(2, 4), slice(3, 7), slice(5, 11))
    seen = []
    window = source._window
    source._window = lambda name, *a: (
      seen.append((name, *a)) or window(name, *a)
    )
    np.testing.assert_array_equal(source.read(leaf, region), whole[region])
    self.assertEqual(
      seen,
      [
        (
          f'model.layers.2.mlp.experts.{e}.down_proj.weight',
          slice(5, 11),
          slice(3, 7),
        )
        for e in (2, 3)
      ],
    )

  def test_any_region_of_float8_equals_the_slice_of_the_whole(self):
    config = ds.changed(hf_models.V3, {'dim': 200, 'moe.width': 150})
    self.saved(config, quantize='fp8')
    self.assert_regions_equal(hf.load(self.folder, mtp=True)[1])

  @parameterized.parameters('v3', 'v2', 'llama', 'qwen3_moe')
  def test_any_region_equals_the_slice_of_the_whole(self, family):
    self.assert_regions_equal(self.saved(hf_models.FAMILIES[family]))

  def assert_regions_equal(self, variables):
    source = Source(self.folder, mtp=True)
    draw = np.random.default_rng(0)
    for leaf in source.leaves:
      whole = variables
      for key in leaf.path:
        whole = whole[key]
      for _ in range(3):
        cuts = [np.sort(draw.choice(n + 1, 2, False)) for n in leaf.shape]
        region = tuple(slice(int(a), int(b)) for a, b in cuts)
        np.testing.assert_array_equal(
          source.read(leaf, region), whole[region], leaf.name
        )


class RefusedTest(FolderTest):
  def assert_refused(self, message, **options):
    with self.assertRaisesRegex(InputError, message):
      hf.load(self.folder, **options)

  def test_missing_tensor_is_named(self):
    self.saved()
    self.edit(lambda t: t.pop('model.layers.1.mlp.experts.2.up_proj.weight'))
    self.assert_refused('experts.2.up_proj.weight.*missing.*ffn.gate_up')

  def test_dropped_selection_bias_is_an_error(self):
    self.saved()
    name = 'model.layers.1.mlp.gate.e_score_correction_bias'
    self.edit(lambda t: t.pop(name))
    self.assert_refused('e_score_correction_bias.*is missing')

  def test_wrong_shape_is_named(self):
    self.saved()
    name = 'model.layers.0.self_attn.o_proj.weight'
    self.edit(lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    self.assert_refused(r'o_proj.weight.*\[16, 24\].*makes it \[24, 16\]')

  def test_unknown_tensor_is_named(self):
    self.saved()
    extra = {'model.layers.0.self_attn.q_a_proj.bias': np.ones(12, np.float32)}
    self.edit(lambda t: t.update(extra))
    self.assert_refused(r'q_a_proj.bias.*belongs to nothing')

  def test_tables_of_old_files_are_named_as_unused(self):
    self.saved(hf_models.LLAMA)
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    self.edit(lambda t: t.update({name: np.ones(5, np.float32)}))
    self.assertEqual(
      Source(self.folder).unused, {name: 'follows from config.json'}
    )

  def test_integers_are_no_weights(self):
    self.saved()
    self.edit(lambda t: t.update({'model.norm.weight': np.ones(24, np.int32)}))
    self.assert_refused('model.norm.weight.*int32: not supported')

  def test_head_that_contradicts_tying_is_refused(self):
    self.saved(hf_models.LLAMA)
    embed = load_file(self.file)['model.embed_tokens.weight']
    self.edit(lambda t: t.update({'lm_head.weight': embed.copy()}))
    self.assertIn('lm_head.weight', Source(self.folder).unused)
    self.edit(lambda t: t.update({'lm_head.weight': embed + 1}))
    self.assert_refused("'lm_head.weight' differs from")

  def test_mtp_copy_that_is_none_is_refused(self):
    self.saved()
    name = 'model.layers.3.embed_tokens.weight'
    self.edit(lambda t: t.update({name: t[name] + 1}))
    self.assert_refused('layers.3.embed_tokens.weight. differs', mtp=True)
    hf.load(self.folder)

  def test_mtp_that_the_file_lacks_is_an_error_when_asked_for(self):
    self.saved(ds.changed(hf_models.V3, {'mtp.depth': 0}))
    self.edit_config(num_nextn_predict_layers=1)
    hf.load(self.folder)
    self.assert_refused('layers.3.*is missing', mtp=True)

  def test_float8_needs_its_scales_and_block_size(self):
    self.saved(quantize='fp8')
    name = 'model.layers.0.mlp.up_proj.weight_scale_inv'
    scale = np.ones((1, 1), np.float32)
    self.edit(lambda t: t.update({name: np.ones((2, 1), np.float32)}))
    self.assert_refused(r'up_proj.weight_scale_inv.*\[2, 1\].*\[1, 1\]')
    self.edit(lambda t: t.pop(name))
    self.assert_refused('up_proj.weight.*float8_e4m3fn with no scale_inv')
    self.edit(lambda t: t.update({name: scale}))
    self.edit_config(quantization_config=None)
    self.assert_refused('quantization_config: missing')

  def test_scales_without_float8_are_refused(self):
    self.saved()
    name = 'model.layers.0.mlp.up_proj.weight_scale_inv'
    self.edit(lambda t: t.update({name: np.ones((1, 1), np.float32)}))
    self.assert_refused('up_proj.weight. is float32 with a scale_inv')

  def test_folder_without_config_is_named(self):
    self.assert_refused('config.json: cannot be read')

  def test_arrays_that_do_not_fit_are_named(self):
    variables = hf_models.variables(hf_models.LLAMA)
    wide = dataclasses.replace(hf_models.LLAMA, vocab_size=50)
    with self.assertRaisesRegex(InputError, r'embed is \[48, 24\].*\[50, 24\]'):
      hf.save(self.folder, wide, variables)
    del variables['params']['norm']
    with self.assertRaisesRegex(InputError, 'params.norm.scale is missing'):
      hf.save(self.folder, hf_models.LLAMA, variables)

  @parameterized.parameters(
    ({'dtype': 'int8'}, "dtype = 'int8'"),
    ({'quantize': 'int4'}, "quantize = 'int4'"),
  )
  def test_unknown_format_is_named(self, options, message):
    with self.assertRaisesRegex(InputError, message):
      self.saved(**options)


if __name__ == '__main__':
  absltest.main()
