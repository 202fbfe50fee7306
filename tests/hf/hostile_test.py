"""A config.json from anywhere: one line, soon, or a model."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import config_json_test
import hf_models
import hostile_configs
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_json, config_limits
from deepseek_jax.hf.source import Source

_V3 = config_json_test._V3
_YARN = _V3['rope_scaling']


def _bounded(*arguments):
  """Returns what hostile_configs prints."""
  here = os.path.dirname(__file__)
  done = subprocess.run(
    [sys.executable, os.path.join(here, 'hostile_configs.py'), *arguments],
    capture_output=True,
    text=True,
    timeout=1800,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert not done.returncode, done.stderr
  return json.loads(done.stdout)


class HostileTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'quantization_config': 7}, 'quantization_config'),
    ({'rope_scaling': 7}, 'rope_scaling'),
    ({'rope_scaling': []}, 'rope_scaling'),
    ({'rope_scaling': {'type': ['yarn']}}, 'rope_scaling.type'),
    ({'rope_scaling': {'type': {}}}, 'rope_scaling.type'),
    ({'model_type': ['deepseek_v3']}, 'model_type'),
    ({'model_type': {}}, 'model_type'),
    ({'architectures': [{}]}, 'architectures'),
    (
      {'rope_scaling': _YARN | {'original_max_position_embeddings': math.inf}},
      'original_max_position_embeddings = inf',
    ),
    ({'rope_scaling': _YARN | {'factor': 0}}, 'factor = 0'),
    ({'rope_scaling': _YARN | {'factor': math.nan}}, 'factor = nan'),
    ({'rope_scaling': _YARN | {'mscale': math.inf}}, 'mscale = inf'),
    ({'rope_scaling': _YARN | {'mscale_all_dim': math.nan}}, 'mscale_all_dim'),
    ({'rope_scaling': _YARN | {'mscale_all_dim': -1}}, 'mscale_all_dim = -1'),
    ({'rope_theta': 10**400}, 'rope_theta = an integer of 1329 bits'),
    ({'rope_theta': 0.5}, 'rope_theta = 0.5'),
    ({'kv_lora_rank': 2**63}, 'kv_lora_rank'),
    ({'kv_lora_rank': -1}, 'kv_lora_rank = -1'),
    ({'q_lora_rank': 0}, 'q_lora_rank = 0'),
    ({'num_hidden_layers': 10**9}, 'num_hidden_layers = 1000000000'),
    ({'num_nextn_predict_layers': 10**9}, 'num_nextn_predict_layers'),
    ({'n_routed_experts': 10**9}, 'n_routed_experts'),
    ({'rms_norm_eps': -1.0}, 'rms_norm_eps = -1.0'),
    ({'rms_norm_eps': math.nan}, 'rms_norm_eps = nan'),
    ({'rms_norm_eps': 0}, 'rms_norm_eps = 0'),
    ({'rms_norm_eps': 1e-60}, 'rms_norm_eps = 1e-60'),
    ({'routed_scaling_factor': math.nan}, 'routed_scaling_factor = nan'),
    ({'routed_scaling_factor': -2.5}, 'routed_scaling_factor = -2.5'),
    ({'routed_scaling_factor': 1e300}, 'routed_scaling_factor'),
    ({'initializer_range': math.inf}, 'initializer_range = inf'),
    ({'eos_token_id': math.nan}, 'eos_token_id = nan'),
    ({'eos_token_id': [2**70]}, 'eos_token_id'),
    ({'id2label': hostile_configs.deep(400)}, 'id2label'),
    ({'hidden_act': 'x' * 10**6}, 'hidden_act'),
    (
      {'hidden_size': 2**20, 'moe_intermediate_size': 2**22},
      'parameters; at most',
    ),
  )
  def test_the_field_is_named_at_once(self, fields, named):
    begun = time.monotonic()
    with self.assertRaises(InputError) as caught:
      config_json.parse(_V3 | fields)
    self.assertLess(time.monotonic() - begun, 5)
    line = str(caught.exception)
    self.assertStartsWith(line, 'config.json: ')
    self.assertIn(named, line)
    self.assertLess(len(line), 400)

  def test_real_files_are_far_inside_of_the_limits(self):
    for fields in (_V3, config_json_test._V2_LITE, config_json_test._LLAMA):
      for name, value in fields.items():
        limit = config_limits.LIMITS.get(name)
        if limit and type(value) is int and limit.high < 1e9:
          self.assertLess(value * 7, limit.high, name)

  def test_layers_and_experts_are_counted_in_the_files_first(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    hf.save(folder, hf_models.V3, hf_models.variables(hf_models.V3))
    path = Path(folder, 'config.json')
    fields = json.loads(path.read_text())
    for change, message in (
      ({'num_hidden_layers': 1024}, 'num_hidden_layers = 1024: .* layer 4'),
      ({'n_routed_experts': 16384}, 'n_routed|is missing|makes it'),
    ):
      path.write_text(json.dumps(fields | change))
      begun = time.monotonic()
      with self.assertRaisesRegex(InputError, message):
        Source(folder)
      self.assertLess(time.monotonic() - begun, 20)

  def test_mutated_files_of_every_family(self):
    out = _bounded('0', '150')
    self.assertEqual(out['bad'], [])
    self.assertBetween(out['accepted'], 1, 40)

  @pytest.mark.slow
  def test_many_mutated_files_of_every_family(self):
    self.assertEqual(_bounded('1', '4000')['bad'], [])


if __name__ == '__main__':
  absltest.main()
