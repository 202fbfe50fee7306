"""Choosing between the reference and the kernel, and saying why."""

import logging
from unittest import mock

import numpy as np
from absl.testing import absltest

from pallas_kernels import dispatch, target


def refuse(x):
  raise NotImplementedError(f'x={x} is odd')


def double(x):
  return 2 * x


REFUSING = {'reference': double, 'gpu': refuse}


class DispatchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    dispatch.say_once.cache_clear()

  def test_without_a_hopper_gpu_the_reference_runs_and_says_so_once(self):
    with self.assertLogs('pallas_kernels', logging.INFO) as logs:
      for _ in range(3):
        self.assertEqual(dispatch.run('op', None, REFUSING, 3), 6)
    self.assertLen(logs.output, 1)
    self.assertIn('op: reference in use: the target, cpu, is', logs.output[0])

  def test_an_unsupported_shape_falls_back_and_warns_once(self):
    with (
      mock.patch.object(dispatch, 'on_hopper', lambda: True),
      self.assertLogs('pallas_kernels', logging.WARNING) as logs,
    ):
      for _ in range(3):
        self.assertEqual(dispatch.run('op', None, REFUSING, 3), 6)
    self.assertEqual(
      logs.output,
      ['WARNING:pallas_kernels:op: reference in use: x=3 is odd'],
    )

  def test_a_forced_choice_is_kept(self):
    with mock.patch.object(dispatch, 'on_hopper', lambda: True):
      self.assertEqual(dispatch.run('op', 'reference', REFUSING, 3), 6)
      self.assertEqual(
        dispatch.run('op', None, {'reference': refuse, 'gpu': double}, 3), 6
      )
    with self.assertRaisesRegex(NotImplementedError, 'x=3 is odd'):
      dispatch.run('op', 'gpu', REFUSING, 3)

  def test_using_decides_where_nothing_else_does(self):
    with dispatch.using('gpu'):
      with self.assertRaisesRegex(NotImplementedError, 'x=3 is odd'):
        dispatch.run('op', None, REFUSING, 3)
      self.assertEqual(dispatch.run('op', 'reference', REFUSING, 3), 6)
      with dispatch.using(None):
        self.assertIsNone(dispatch.chosen(None))
      self.assertEqual(dispatch.chosen(None), 'gpu')
    self.assertIsNone(dispatch.chosen(None))
    wrong = self.assertRaisesRegex(ValueError, "impl='fast'; use None")
    with wrong, dispatch.using('fast'):
      pass

  def test_any_name_that_an_operation_has_can_be_forced(self):
    functions = {**REFUSING, 'vendor': lambda x: 3 * x}
    self.assertEqual(dispatch.run('op', 'vendor', functions, 3), 9)
    self.assertEqual(dispatch.run('op', None, functions, 3), 6)
    with self.assertRaisesRegex(
      ValueError, "op: impl='fast'; use None, 'reference', 'gpu' or 'vendor'$"
    ):
      dispatch.run('op', 'fast', functions, 3)
    with self.assertRaisesRegex(
      ValueError, "op: impl='vendor'; use None, 'reference' or 'gpu'$"
    ):
      dispatch.run('op', 'vendor', REFUSING, 3)

  def test_an_operation_without_a_kernel_for_hopper_is_its_reference(self):
    with (
      mock.patch.object(dispatch, 'on_hopper', lambda: True),
      self.assertLogs('pallas_kernels', logging.INFO) as logs,
    ):
      self.assertEqual(dispatch.run('op', None, {'reference': double}, 3), 6)
    self.assertIn('there is no kernel for Hopper GPUs', logs.output[0])
    with (
      dispatch.using('gpu'),
      self.assertRaisesRegex(ValueError, "impl='gpu'; use None or 'reference'"),
    ):
      dispatch.run('op', None, {'reference': double}, 3)

  def test_on_a_tpu_its_kernel_runs_or_the_reference_says_why(self):
    functions = {'reference': double, 'gpu': refuse, 'tpu': lambda x: 3 * x}
    refusing = {'reference': double, 'tpu': refuse}
    with (
      target.targeting('tpu'),
      self.assertLogs('pallas_kernels', logging.INFO) as logs,
    ):
      self.assertEqual(dispatch.run('op', None, functions, 3), 9)
      for _ in range(2):
        self.assertEqual(dispatch.run('none', None, REFUSING, 3), 6)
        self.assertEqual(dispatch.run('odd', None, refusing, 3), 6)
      self.assertEqual(dispatch.run('op', 'reference', functions, 3), 6)
      with self.assertRaisesRegex(NotImplementedError, 'x=3 is odd'):
        dispatch.run('op', 'gpu', functions, 3)
    self.assertEqual(
      logs.output,
      [
        'INFO:pallas_kernels:none: reference in use: there is no kernel for'
        ' TPUs',
        'WARNING:pallas_kernels:odd: reference in use: x=3 is odd',
      ],
    )
    # Elsewhere it isn't picked.
    functions['gpu'] = lambda x: 4 * x
    for name, want in (('cpu', 6), ('rocm', 6)):
      with target.targeting(name):
        self.assertEqual(dispatch.run('op', None, functions, 3), want)
    with target.targeting('cuda', '9.0'):
      self.assertEqual(dispatch.run('op', None, functions, 3), 12)

  def test_tpu_is_forced_where_there_is_such_a_kernel(self):
    functions = {'reference': refuse, 'tpu': double}
    with dispatch.using('tpu'), dispatch.recorded() as found:
      self.assertEqual(dispatch.run('op', None, functions, 3), 6)
      with self.assertRaisesRegex(NotImplementedError, 'x=3 is odd'):
        dispatch.run('op', None, {'reference': double, 'tpu': refuse}, 3)
      # Few operations have one.
      self.assertEqual(dispatch.run('none', None, REFUSING, 3), 6)
    reason = 'there is no kernel for TPUs'
    self.assertEqual(
      [(c.op, c.impl, c.reason) for c in found],
      [('op', 'tpu', ''), ('none', 'reference', reason)],
    )

  def test_no_kernel_gets_an_empty_array(self):
    empty = np.zeros(0)
    with self.assertRaisesRegex(NotImplementedError, 'an argument is empty'):
      dispatch.run('op', 'gpu', {'reference': refuse, 'gpu': double}, empty)


if __name__ == '__main__':
  absltest.main()
