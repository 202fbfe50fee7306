"""A run trains on a mesh from end to end, and goes on on any other."""

import functools

import pytest
from absl.testing import absltest, parameterized

from tests import fake_devices
from tests.scale import resume


@functools.cache
def results():
  return fake_devices.run('tests.scale.resume', *resume.MESHES)


@pytest.mark.slow
class ResumeTest(parameterized.TestCase):
  @parameterized.parameters(
    resume.SAVED, *(f'{resume.SAVED} to {name}' for name in resume.MESHES)
  )
  def test_the_run_is_the_one_of_one_device(self, name):
    found = results()[name]
    self.assertEqual(found['steps'], resume.STEPS)
    self.assertLess(found['loss'], 1e-5)
    # Adam divides by small moments: rounding moves an update of 3e-3 a little.
    self.assertLess(found['parameters'], 1e-3)
    self.assertEqual(found['bias'], 0)


if __name__ == '__main__':
  absltest.main()
