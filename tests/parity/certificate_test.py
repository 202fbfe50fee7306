"""experiments.verify: passes on equal models, fails on unequal ones."""

import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import parity_harness as ph
import pytest
from absl.testing import absltest

from deepseek_jax import hf
from deepseek_jax.hf import verify
from deepseek_jax.hf.source import Source


class CertificateTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    rope = ph.yarn(mscale=1.0, mscale_all_dim=1.0)
    theirs = ph.make_theirs('v3', num_hidden_layers=2, rope_scaling=rope)
    theirs.save_pretrained(cls.folder)
    # The launcher is tested on what compiles fastest.
    cls.llama = cls.enterClassContext(tempfile.TemporaryDirectory())
    ph.make_theirs('llama', num_hidden_layers=2).save_pretrained(cls.llama)

  def run_verify(self, *flags):
    out = os.path.join(
      self.folder, '..', f'{os.path.basename(self.folder)}.out'
    )
    self.addCleanup(lambda: os.path.exists(out) and os.remove(out))
    command = [sys.executable, '-m', 'experiments.verify', f'--out={out}']
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    return done, out

  def test_equal_models_pass_and_are_named_by_their_hashes(self):
    done, out = self.run_verify(f'--hf={self.llama}', '--lengths=1,7')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('PASSED', done.stdout)
    with open(out) as file:
      certificate = json.load(file)
    self.assertTrue(certificate['passed'])
    names = [case['case'] for case in certificate['cases']]
    self.assertEqual(
      names,
      [
        '1 tokens',
        '7 tokens',
        'padded right',
        'padded left',
        'cached decoding',
      ],
    )
    for case in certificate['cases']:
      self.assertLess(case['max'], 1e-4)
      self.assertEqual(case['top1'], 1)
      decoding = case['case'] == 'cached decoding'
      self.assertLen(case['layers'], 0 if decoding else 2)
    self.assertLen(certificate['files']['model.safetensors'], 64)
    self.assertIn('transformers', certificate['versions'])

  def test_bad_input_is_status_2(self):
    done, _ = self.run_verify(f'--hf={self.folder}/none')
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertIn('none: is no folder', done.stderr)
    done, _ = self.run_verify(f'--hf={self.folder}', '--lengths=0')
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertIn('numbers above 0', done.stderr)

  @pytest.mark.slow
  def test_difference_past_the_threshold_is_status_1(self):
    done, out = self.run_verify(
      f'--hf={self.llama}', '--lengths=7', '--max_logit=1e-12'
    )
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertIn('FAILED', done.stdout)
    with open(out) as file:
      self.assertFalse(json.load(file)['passed'])

  def test_fault_shows_in_the_layer_that_has_it(self):
    ours, theirs = verify.Ours(self.folder), verify.Theirs(self.folder)
    segments = ours.variables['params']['segments']
    block = segments[1][0]['ffn']
    block['down'] = jax.numpy.zeros_like(block['down'])
    case = next(verify.cases(self.folder, ours.config.vocab_size, (7,)))
    row = verify.difference(case, ours.run(case), theirs.run(case))
    self.assertLess(row['layers'][0]['max'], 1e-4)
    self.assertGreater(row['layers'][1]['max'], 1e-2)

  def test_float8_is_dequantized_for_transformers(self):
    pair = ph.pair('v3', num_hidden_layers=2)
    ids = ph.tokens(pair)
    with tempfile.TemporaryDirectory() as root:
      folder, readable = os.path.join(root, 'fp8'), os.path.join(root, 'f32')
      hf.save(folder, pair.config, pair.variables, quantize='fp8')
      source = Source(folder)
      self.assertTrue(source.quantized)
      theirs = verify.Theirs(verify._readable(source, readable)).model
      config, variables = hf.load(folder)
    theirs = ph.their_logits(ph.Pair(theirs, config, variables), ids)
    ours = ph.logits(ph.Pair(None, config, variables), ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ph.LOGITS_ATOL)
    exact = ph.their_logits(pair, ids)
    self.assertGreater(np.abs(exact - theirs).max(), 1e-3)


if __name__ == '__main__':
  absltest.main()
