"""Qwen3-MoE: folders go both ways, and the certificate knows a fault."""

import os
import tempfile

import chex
import jax.numpy as jnp
import numpy as np
import parity_harness as ph
from absl.testing import absltest

from deepseek_jax import hf
from deepseek_jax.hf import verify


class FolderTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def folder(self, name):
    return os.path.join(self.root, name)

  def test_both_write_what_the_other_reads(self):
    pair = ph.pair('qwen3_moe', num_hidden_layers=2, mlp_only_layers=[0])
    hf.save(self.folder('ours'), pair.config, pair.variables)
    theirs = ph.transformers.AutoModelForCausalLM.from_pretrained(
      self.folder('ours')
    )
    self.assertIsInstance(theirs, ph.transformers.Qwen3MoeForCausalLM)
    named = dict(theirs.named_parameters())
    for name, p in pair.theirs.named_parameters():
      np.testing.assert_array_equal(p.detach(), named[name].detach(), name)
    theirs.save_pretrained(self.folder('again'))
    config, variables = hf.load(self.folder('again'))
    self.assertEqual(config, pair.config)
    chex.assert_trees_all_equal(variables, pair.variables)

  def test_the_certificate_passes_and_sees_another_norm(self):
    ph.make_theirs('qwen3_moe', num_hidden_layers=2).save_pretrained(self.root)
    ours, theirs = verify.Ours(self.root), verify.Theirs(self.root)
    rows = []
    for _ in range(2):
      every = verify.cases(self.root, ours.config.vocab_size, (9,))
      rows.append(
        [verify.difference(c, ours.run(c), theirs.run(c)) for c in every]
      )
      block = ours.variables['params']['segments'][0][0]['attention']
      block['k_norm']['scale'] = jnp.ones_like(block['k_norm']['scale'])
    names = [row['case'] for row in rows[0]]
    self.assertContainsSubset(['padded left', 'cached decoding'], names)
    self.assertLess(max(row['max'] for row in rows[0]), 1e-4)
    self.assertGreater(min(row['max'] for row in rows[1]), 1e-2)


if __name__ == '__main__':
  absltest.main()
