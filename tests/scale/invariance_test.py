"""Loss, gradients, biases, loads and drops are the same on every mesh.

Float32: sums of floats in another order, so 1e-5 of the greatest value; what
counts tokens, and what moves by the sign of a count, is exactly the same.
"""

import functools

import pytest
from absl.testing import absltest, parameterized
from rich.console import Console
from rich.table import Table

from tests import fake_devices
from tests.scale import invariance

FAST = ('expert=4 tensor=2',)
ALL = tuple(invariance.MESHES)
COLUMNS = ('loss', 'gradient', 'bias', 'load', 'dropped')
_seen = {}


@functools.cache
def results(model, *meshes):
  return fake_devices.run('tests.scale.invariance', model, *meshes)


def tearDownModule():
  table = Table(title='greatest difference from one device')
  for column in ('mesh', 'devices', *COLUMNS):
    table.add_column(column, justify='left' if column == 'mesh' else 'right')
  for name, found in _seen.items():
    cells = [f'{found[column]:.1e}' for column in COLUMNS]
    table.add_row(name, str(invariance.MESHES[name].devices), *cells)
  Console(width=100).print(table)


class InvarianceCase(parameterized.TestCase):
  def holds(self, name, found):
    _seen[name] = found
    self.assertGreater(found['moved'], 0)
    self.assertGreater(found['drops'], 0)
    for column in ('loss', 'gradient', 'gradient norm'):
      self.assertLess(found[column], 1e-5, column)
    for column in ('bias', 'load', 'dropped'):
      self.assertEqual(found[column], 0, column)


class InvarianceTest(InvarianceCase):
  @parameterized.parameters(*((name,) for name in FAST))
  def test_a_step_equals_that_on_one_device(self, name):
    self.holds(name, results('step', *FAST)[name])

  def test_chunks_of_the_head_hold_tokens_of_every_device(self):
    self.assertLess(results('step', *FAST)['cross entropy'], 1e-5)

  def test_parameters_are_made_where_they_lie(self):
    made = results('step', *FAST)['made']
    self.assertTrue(made['same'])
    self.assertLess(made['held'], made['whole'] / 6)
    # XLA aligns small arrays and adds a table of results.
    self.assertLess(made['output'], made['held'] + 4096)
    self.assertLess(made['scratch'], made['whole'] / 2)


@pytest.mark.slow
class EveryMeshTest(InvarianceCase):
  @parameterized.parameters(*ALL)
  def test_a_step_equals_that_on_one_device(self, name):
    # Four at a time: a process keeps all that it compiled.
    at = ALL.index(name) // 4 * 4
    self.holds(name, results('v3', *ALL[at : at + 4])[name])


if __name__ == '__main__':
  absltest.main()
