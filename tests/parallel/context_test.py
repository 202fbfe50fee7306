"""Latent attention over a split sequence equals one device's."""

import pytest
from absl.testing import absltest

from tests import fake_devices
from tests.parallel import context_worker as worker


class ContextTest(absltest.TestCase):
  def check(self, found, cases):
    self.assertLen(found, len(cases))
    for case, error in found.items():
      with self.subTest(case):
        self.assertLess(error, 1e-5)

  def test_values_and_gradients_equal_one_device(self):
    found = fake_devices.run('tests.parallel.context_worker')
    self.check(found['attention'], worker.FAST)
    self.latents_alone_are_gathered(found['gathers'])
    # 259, of which bfloat16 keeps 8 bits; in bfloat16 the sum stays at 256.
    want = {'least': 260, 'greatest': 260, 'reduced_as_it_is': False}
    self.assertEqual(found['sum'], want)

  def latents_alone_are_gathered(self, lines):
    """C + R numbers a token and its document, once; no keys, no values."""
    shapes = [line.split('[')[1].split(']')[0] for line in lines]
    sizes = [[int(n) for n in shape.split(',')] for shape in shapes]
    self.assertTrue(all(worker.T in s for s in sizes), sizes)
    numbers = sum(s[-1] if len(s) == 3 else 1 for s in sizes)
    self.assertEqual(numbers, worker.C + worker.R + 1)

  @pytest.mark.slow
  def test_other_meshes_and_a_whole_model(self):
    found = fake_devices.run('tests.parallel.context_worker', 'slow')
    self.check(found['attention'], worker.SLOW)
    self.assertLess(found['model']['error'], 1e-5)
    self.assertTrue(found['model']['counts_equal'])


if __name__ == '__main__':
  absltest.main()
