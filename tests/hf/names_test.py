from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.hf import names, saving


class PublishedNamesTest(absltest.TestCase):
  def test_v3_files_have_their_published_number_of_tensors(self):
    """91,991 tensors, scales and MTP layer included, 684.49 billion weights."""
    listed = saving.stored(ds.presets.v3(), saving.Format('bfloat16', 'fp8'))
    tensors = {k: v for one in listed for k, v in one.tensors().items()}
    self.assertLen(tensors, 91991)
    count = sum(_size(one.part.leaf.theirs) for one in listed)
    self.assertEqual(count, 684_489_845_504)
    quantized = {n for n in tensors if n.endswith('_scale_inv')}
    self.assertLen(quantized, 45808)
    self.assertNotIn('model.layers.61.eh_proj.weight_scale_inv', quantized)
    scale = tensors[
      'model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv'
    ]
    self.assertEqual(scale[1], (5, 56))  # 576 rows: the last block is ragged

  def test_v3_shapes_are_the_published_ones(self):
    listed = saving.stored(ds.presets.v3(), saving.Format('bfloat16'))
    shapes = {one.name: one.part.leaf.theirs for one in listed}
    layer = 'model.layers.60.'
    for name, shape in {
      'model.embed_tokens.weight': (129280, 7168),
      'lm_head.weight': (129280, 7168),
      f'{layer}self_attn.q_a_proj.weight': (1536, 7168),
      f'{layer}self_attn.q_b_proj.weight': (24576, 1536),
      f'{layer}self_attn.kv_a_proj_with_mqa.weight': (576, 7168),
      f'{layer}self_attn.kv_b_proj.weight': (32768, 512),
      f'{layer}self_attn.o_proj.weight': (7168, 16384),
      f'{layer}mlp.gate.weight': (256, 7168),
      f'{layer}mlp.gate.e_score_correction_bias': (256,),
      f'{layer}mlp.experts.255.up_proj.weight': (2048, 7168),
      f'{layer}mlp.experts.255.down_proj.weight': (7168, 2048),
      'model.layers.2.mlp.down_proj.weight': (7168, 18432),
      'model.layers.61.eh_proj.weight': (7168, 14336),
      'model.layers.61.shared_head.head.weight': (129280, 7168),
      'model.layers.61.embed_tokens.weight': (129280, 7168),
    }.items():
      self.assertEqual(shapes[name], shape, name)

  def test_v2_lite_has_no_query_compression(self):
    listed = saving.stored(ds.presets.v2_lite(), saving.Format('bfloat16'))
    shapes = {one.name: one.part.leaf.theirs for one in listed}
    self.assertEqual(
      shapes['model.layers.0.self_attn.q_proj.weight'], (3072, 2048)
    )
    self.assertFalse([n for n in shapes if 'q_a' in n or 'q_b' in n])
    self.assertEqual(sum(map(_size, shapes.values())), 15_706_484_224)

  def test_layers_of_a_pattern_are_numbered_in_order(self):
    config = ds.changed(
      ds.presets.v3_tiny(),
      {'layout': ((('dense',), 1), (('moe', 'moe'), 2)), 'mtp.depth': 0},
    )
    found = {
      leaf.path: leaf.prefixes
      for leaf in names.leaves(config)
      if leaf.path[-2:] == ('router', 'weight')
    }
    self.assertEqual(
      list(found.values()),
      [
        ('model.layers.1.', 'model.layers.3.'),
        ('model.layers.2.', 'model.layers.4.'),
      ],
    )

  def test_every_tensor_is_one_slice(self):
    """No two tensors share a place and no place is left out."""
    for preset in ('v3_tiny', 'v2_lite', 'llama31_8b'):
      for leaf in names.leaves(getattr(ds.presets, preset)()):
        parts = list(names.parts(leaf))
        self.assertLen({(p.at, p.half) for p in parts}, len(parts))
        self.assertEqual(
          len(parts) * _size(leaf.theirs), _size(leaf.shape), leaf.name
        )


def _size(shape):
  out = 1
  for n in shape:
    out *= n
  return out


if __name__ == '__main__':
  absltest.main()
