"""Distillation on meshes of fake devices and in two processes.

Float32: sums of floats in another order, so 1e-6 of the greatest value after
some updates; the drawn tokens are the same.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from tests import fake_devices
from tests.faults import launches
from tests.rl import taught


class MeshTest(parameterized.TestCase):
  def check(self, *names):
    module = 'tests.run.distill_mesh_worker'
    found = fake_devices.run(module, *names, devices=4)
    self.assertTrue(found)
    for name, gaps in found.items():
      with self.subTest(name):
        self.assertTrue(gaps['same'])
        self.assertLess(gaps['said'], 1e-5)
        self.assertLess(gaps['params'], 1e-6)

  def test_two_devices_share_the_rows(self):
    self.check('data 2')

  @pytest.mark.slow
  def test_four_devices_share_weights_and_tokens(self):
    self.check('context 2', 'fsdp 2 data 2', 'data 2 tensor 2')

  @parameterized.parameters('distill', 'init_from', 'reference')
  @pytest.mark.slow
  def test_two_processes_are_one_run(self, way):
    home = Path(self.enterContext(tempfile.TemporaryDirectory()))
    rows = {}
    for count in (1, 2):
      workers = launches.start(
        home / str(count),
        f'--taught={taught.folder()}',
        f'--way={way}',
        count=count,
        module='tests.run.distill_process_worker',
      )
      codes = launches.end(workers, 400)
      said = '\n'.join(w.said() for w in workers)
      self.assertEqual(codes, [0] * count, msg=said)
      rows[count] = ds.read_metrics(str(home / str(count)))
    self.assertNotEmpty(rows[1])
    for a, b in zip(rows[1], rows[2], strict=True):
      for key in ('reward', 'answer_length'):
        self.assertEqual(a.get(key), b.get(key))
      for key in ('loss', 'grad_norm', 'kl'):
        if key in a:
          np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-7)


if __name__ == '__main__':
  absltest.main()
