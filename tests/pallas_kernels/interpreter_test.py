"""Every kernel in the Mosaic interpreter: values, gradients and races."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl.testing import absltest, parameterized

HERE = pathlib.Path(__file__).parent
SCRIPTS = {
  'mla_decode': 'interpreted.py',
  'router': 'interpreted.py',
  'permute': 'interpreted.py',
  'grouped_matmul': 'interpreted.py',
  'quantize': 'interpreted.py',
  'quantize_columns': 'interpreted.py',
  'sinkhorn': 'interpreted.py',
  'collapse_norm': 'interpreted.py',
  'write_streams': 'interpreted.py',
  'mla_prefill': 'interpreted.py',
  'race': 'interpreted.py',
  'overwritten': 'interpreted.py',
  'grouped_swiglu': 'interpreted_experts.py',
  'grouped_matmul_fp8': 'interpreted_experts.py',
  'grouped_matmul_float8': 'interpreted_experts.py',
  'permute_fp8': 'interpreted_experts.py',
  'swiglu_quantize': 'interpreted_experts.py',
  'latent_kv': 'interpreted_sparse.py',
  'compress': 'interpreted_sparse.py',
  'indexer': 'interpreted_sparse.py',
  'indexer_fp8': 'interpreted_sparse.py',
  'index_candidates': 'interpreted_sparse.py',
  'mla_decode_fp8': 'interpreted_sparse.py',
  'sparse_mla': 'interpreted_sparse.py',
  'sparse_gqa': 'interpreted_sparse.py',
  'attention_shares': 'interpreted_sparse.py',
  'sparse_mla_parts': 'interpreted_sparse.py',
}
RACES = ('race', 'overwritten')


def interpret(op: str) -> subprocess.CompletedProcess:
  root = str(HERE.parents[1])
  return subprocess.run(
    [sys.executable, str(HERE / SCRIPTS[op]), op],
    env={
      **os.environ,
      'PYTHONPATH': root,
      'JAX_PLATFORMS': 'cpu',
      # XLA's threads: on one core a waiting warpgroup would take the only one.
      'NPROC': '8',
    },
    capture_output=True,
    text=True,
    timeout=1200,
  )


@pytest.mark.slow
@absltest.skipIf(
  jax.__version_info__ < (0, 11),
  'the interpreter of jax 0.10 cannot load with a layout; use 0.11 or later',
)
class InterpreterTest(parameterized.TestCase):
  @parameterized.product(op=sorted(set(SCRIPTS) - set(RACES)))
  def test_kernel_equals_reference_without_races(self, op):
    done = interpret(op)
    output = done.stdout + done.stderr
    self.assertEqual(done.returncode, 0, output[-3000:])
    self.assertNotIn('RACE DETECTED', output)
    self.assertIn(' error ', output)

  @parameterized.product(op=RACES)
  def test_a_race_is_caught(self, op):
    done = interpret(op)
    output = done.stdout + done.stderr
    self.assertRegex(output, '(?i)race detected')


if __name__ == '__main__':
  absltest.main()
