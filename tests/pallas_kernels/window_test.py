"""benchmarks.kernels: one window, in which no row costs another."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import (
  kernel_cases,
  kernel_plan,
  kernel_processes,
  kernel_report,
  kernel_stage,
  kernel_timing,
  kernels,
)
from benchmarks.kernel_work import Work
from pallas_kernels.quantize import quantize

FAKE = str(pathlib.Path(__file__).with_name('fake_stage.py'))
ROOT = pathlib.Path(__file__).parents[2]
# What every stage says where a test says nothing else.
GOOD = {
  'floor': [
    {'device': 'NVIDIA H200', 'jax': '9.9'},
    {
      'device': 'NVIDIA H200',
      'jax': '9.9',
      'flops': 8e14,
      'bytes': 4e12,
      'how': 'cupti',
    },
  ],
  'check': [{'error': 0.001, 'tolerance': 0.01}],
  'time': [{'us': 5.0}, {'us': 5.0, 'of_floor': 0.5, 'over_xla': 2.0}],
}
STEM = 'kernels-NVIDIA-H200-9.9'


class WindowTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    kernel_processes.begin()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def run_with(self, told, *flags):
    """(status, rows by name, what was printed, the stages asked for)."""
    script, log = self.folder / 'script.json', self.folder / 'log'
    script.write_text(json.dumps(GOOD | told))
    log.write_text('')
    real = kernels.child

    def child(*args, **more):
      return [
        sys.executable,
        FAKE,
        str(script),
        str(log),
        real(*args, **more)[-1],
      ]

    out = io.StringIO()
    with (
      mock.patch.object(kernels, 'child', child),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(out),
    ):
      status = kernels.main([f'--out={self.folder}', *flags])
    rows = {}
    # Not where the file is none of a report.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
      found = json.loads((self.folder / f'{STEM}.json').read_text())['rows']
      rows = {f'{row["op"]}/{row["shape"]}': row for row in found}
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    return status, rows, out.getvalue(), asked

  def test_all_are_checked_first_and_then_timed_in_order_of_value(self):
    flags = '--only=router,mla_prefill,sinkhorn/v4_t8192'
    status, rows, said, asked = self.run_with({}, flags)
    self.assertEqual(status, 0, said)
    stages = [a['stage'] for a in asked]
    self.assertEqual(stages[0], 'floor')
    self.assertEqual(
      stages, sorted(stages, key=['floor', 'check', 'time'].index)
    )
    checks = {a['op'] for a in asked if a['stage'] == 'check'}
    self.assertEqual(checks, {'router', 'mla_prefill', 'sinkhorn'})
    timed = [(a['op'], a['shape']) for a in asked if a['stage'] == 'time']
    want = [(c.op, c.shape) for c in kernel_plan.chosen(flags[7:])]
    self.assertEqual(timed, want)
    self.assertEqual(timed[0], ('mla_prefill', 's4096_h128'))
    first = rows['mla_prefill/s4096_h128']
    self.assertEqual((first['error'], first['us']), (0.001, 5.0))
    # Other shapes are checked by the process that times them.
    known = {a['shape']: a['checked'] for a in asked if a['stage'] == 'time'}
    self.assertTrue(known['s4096_h128'])
    self.assertFalse(known['s8192_h128_packed'])
    for a in asked[1:]:
      if a['stage'] == 'time':
        self.assertEqual(a['rates']['flops'], 8e14)

  @parameterized.parameters(
    ([{'error': 'inf', 'failed': 'wrong: error inf'}], 'error inf'),
    ([{'failed': 'AssertionError: layout'}], 'AssertionError'),
    (['crash'], 'CUDA_ERROR_ILLEGAL_ADDRESS'),
    (['hang'], 'stopped after 4 s'),
    (['no row'], 'printed no row'),
    (['{"error": 0.1, "us'], 'printed no row'),
  )
  def test_a_bad_op_costs_itself_alone_and_the_status(self, steps, reason):
    told = {'check router': steps}
    limit = 3 if steps == ['hang'] else 60  # checks get half as much again
    flags = '--only=router,sinkhorn', f'--limit={limit}'
    status, rows, said, asked = self.run_with(told, *flags)
    self.assertEqual(status, 1)
    self.assertIn(reason, rows['router/v3_t4096']['failed'])
    self.assertIn('wrong or failed: router/v3_t4096', said)
    timed = {a['op'] for a in asked if a['stage'] == 'time'}
    self.assertEqual(timed, {'sinkhorn'})
    self.assertEqual(rows['sinkhorn/v4_t8192']['us'], 5.0)

  def test_a_row_that_dies_while_it_is_timed_keeps_what_it_has(self):
    told = {
      'time router': [{'us': 7.0}, 'hang'],
      'time sinkhorn': [{'error': 0.5, 'failed': 'wrong: error 0.5'}],
    }
    status, rows, _, _ = self.run_with(
      told, '--only=router/v3_t4096,sinkhorn/v4_t8192,permute', '--limit=4'
    )
    self.assertEqual(status, 1)
    self.assertEqual(rows['router/v3_t4096']['us'], 7.0)
    self.assertEqual(rows['router/v3_t4096']['stopped'], 4)
    self.assertIn('wrong', rows['sinkhorn/v4_t8192']['failed'])
    self.assertEqual(rows['permute/v3_t4096']['us'], 5.0)

  def test_what_interrupts_it_ends_all_stages(self):
    told = {'time': ['hang'], 'time router': [{'us': 7.0}]}
    real = kernels.Window.keep

    def keep(window, case, row):
      if 'us' in row:
        raise OSError('no space left on device')
      real(window, case, row)

    start = time.monotonic()
    with (
      mock.patch.object(kernels.Window, 'keep', keep),
      self.assertRaisesRegex(OSError, 'no space'),
    ):
      # In order of value, so that others hang when it happens.
      self.run_with(told, '--only=router,sinkhorn', '--ahead=2')
    self.assertLess(time.monotonic() - start, 40)
    self.assertEmpty(kernel_processes._running)

  def test_a_row_that_the_end_cuts_short_is_late_and_not_wrong(self):
    told = {'time sinkhorn': ['hang']}
    with mock.patch.object(kernels, '_LEAST', 1):
      flags = '--only=sinkhorn/v4_t8192', '--seconds=14'
      status, rows, said, _ = self.run_with(told, *flags)
    self.assertEqual(status, 0, said)
    self.assertNotIn('failed', rows['sinkhorn/v4_t8192'])
    self.assertIn('no time left for 1 rows: sinkhorn/v4_t8192', said)

  def test_a_smaller_run_keeps_the_rows_of_others(self):
    self.run_with({}, '--only=sinkhorn/v4_t8192,router/v3_t4096')
    slower = {'time': [{'us': 9.0}]}
    status, rows, _, _ = self.run_with(slower, '--only=router/v3_t4096')
    self.assertEqual(status, 0)
    self.assertEqual(rows['sinkhorn/v4_t8192']['us'], 5.0)
    self.assertEqual(rows['router/v3_t4096']['us'], 9.0)
    self.assertIn('date', rows['sinkhorn/v4_t8192'])
    table = (self.folder / f'{STEM}.md').read_text()
    self.assertIn('| sinkhorn | v4_t8192 | 0.001 | 5 |', table)

  def test_a_file_that_is_no_report_is_not_overwritten(self):
    file = self.folder / f'{STEM}.json'
    for text in ('{"rows": [{"us": 3}]}', 'not json', '[1]'):
      file.write_text(text)
      status, _, said, asked = self.run_with({}, '--only=router')
      self.assertEqual(status, 2)
      self.assertIn('move it away', said)
      self.assertEqual(file.read_text(), text)
      self.assertEqual([a['stage'] for a in asked], ['floor'])

  def test_time_that_is_up_is_said(self):
    with mock.patch.object(kernels, '_LEAST', 1e9):
      status, rows, said, asked = self.run_with({}, '--only=sinkhorn')
    self.assertEqual([a['stage'] for a in asked], ['floor'])
    self.assertIn('sinkhorn: no time left to check it first', said)
    self.assertRegex(said, r'no time left for \d+ rows: sinkhorn/v4_t8192')
    self.assertEqual((status, rows), (0, {}))

  def test_without_a_gpu_it_says_so(self):
    told = {'floor': [{'failed': 'no GPU here, but cpu'}]}
    status, rows, said, _ = self.run_with(told)
    self.assertEqual((status, rows), (2, {}))
    self.assertIn('benchmarks.kernels: no GPU here, but cpu', said)

  def test_a_floor_that_fails_is_assumed_and_said(self):
    told = {'floor': [GOOD['floor'][0], 'hang']}
    status, rows, said, asked = self.run_with(
      told, '--only=sinkhorn', '--limit=4'
    )
    self.assertEqual(status, 1)
    self.assertIn('assumed', said)
    self.assertEqual(rows['sinkhorn/v4_t8192']['us'], 5.0)
    self.assertEqual(asked[-1]['rates']['how'], 'assumed')

  @parameterized.parameters(
    ('--only=ruoter', 'no such op or op/shape; did you mean router'),
    ('--only=router/v3_t4069', 'did you mean router/v3_t4096'),
    ('--seconds=0', '--seconds=0.0: must be above 0'),
    ('--limit=nan', '--limit=nan: must be above 0'),
  )
  def test_flags_that_make_no_sense_are_named(self, flag, message):
    out = io.StringIO()
    errors = contextlib.redirect_stderr(out)
    with self.assertRaises(SystemExit) as ended, errors:
      kernels.main([flag])
    self.assertEqual(ended.exception.code, 2)
    self.assertIn(message, out.getvalue())

  def test_what_a_stage_started_ends_with_it(self):
    code = (
      'import subprocess, time;'
      'p = subprocess.Popen(["sleep", "99"]);'
      'print("{\\"pid\\": %d}" % p.pid, flush=True); time.sleep(99)'
    )
    row = kernel_processes.last_row([sys.executable, '-c', code], 4)
    self.assertIn('stopped after 4 s', row['failed'])
    for _ in range(50):
      state = pathlib.Path(f'/proc/{row["pid"]}/stat')
      if not state.exists() or ' Z ' in state.read_text():
        break
      time.sleep(0.1)
    else:
      self.fail(f'process {row["pid"]} lives on')

  def test_a_real_stage_without_a_gpu(self):
    done = subprocess.run(
      [*kernels.child('check', kernel_plan.chosen('router')[0])],
      capture_output=True,
      text=True,
      cwd=ROOT,
    )
    self.assertEqual(done.returncode, 2)
    row = json.loads(done.stdout)
    self.assertEqual(row['failed'], 'no GPU here, but cpu')


class PlanTest(absltest.TestCase):
  def test_every_op_and_shape_has_one_place(self):
    cases = kernel_plan.every_case()
    self.assertLen({case.name for case in cases}, len(cases))
    want = {
      f'{op}/{shape}'
      for op, (shapes, *_) in kernel_cases.OPS.items()
      for shape in shapes
    }
    self.assertEqual({case.name for case in cases}, want)
    known = {'xla', 'cudnn', 'torch', 'flash_mla', 'triton'}
    for case in cases:
      self.assertLessEqual(set(case.contenders), known)

  def test_an_op_is_no_prefix_of_another(self):
    ops = {case.op for case in kernel_plan.chosen('mla_decode')}
    self.assertEqual(ops, {'mla_decode'})
    two = kernel_plan.chosen('quantize/act_t8192_d7168, router/v3_t4096')
    self.assertEqual([c.op for c in two], ['router', 'quantize'])


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    ([1.0, np.nan], [1.0, 2.0], np.inf),
    ([1.0, np.inf], [1.0, 2.0], np.inf),
    ([np.nan, np.nan], [1.0, 2.0], np.inf),
    ([1.0, 2.0], [1.0, np.nan], np.inf),
    ([1.0, 2.0], [np.inf, 2.0], np.inf),
    ([1.0, -np.inf], [1.0, np.inf], np.inf),
    # What has to be none is right as none.
    ([1.0, np.inf], [1.0, np.inf], 0.0),
    ([1.0, np.nan], [1.0, np.nan], 0.0),
    ([1.0, 2.2], [1.0, 2.0], 0.1),
    ([0.0, 0.0], [0.0, 0.0], 0.0),
    ([], [], 0.0),
  )
  def test_nan_is_wrong(self, got, want, error):
    # A right output before and after must not hide it.
    right = np.asarray([5.0])
    made = kernel_timing.worst_error(
      (right, np.asarray(got), right), (right, np.asarray(want), right)
    )
    np.testing.assert_allclose(made, error, rtol=1e-6)

  def test_of_names_the_share_that_differs_counts(self):
    want = np.arange(4000, 4100, dtype=np.int32)
    other = want.copy()
    other[7] += 1
    found = [
      kernel_timing.worst_error(a, want) for a in (other, want + 1, want)
    ]
    self.assertEqual(found, [0.01, 1.0, 0.0])
    shapes, make, small = kernel_cases.OPS['indexer']
    self.assertEqual(make(small(next(iter(shapes.values())))).tolerance, 0)

  def test_float8_may_round_otherwise_and_no_more(self):
    x = np.random.default_rng(0).normal(size=(256, 256))
    codes, scales = quantize(jnp.asarray(x, jnp.bfloat16), impl='reference')
    codes = np.asarray(codes)
    tolerance = Work(None, (), None, 0, 0, {}).tolerance
    error = lambda c, s=scales: kernel_timing.worst_error(
      (c, s), (codes, scales)
    )
    self.assertEqual(error(codes), 0)
    stepped = codes.view(np.uint8).copy()
    stepped[0, :3] ^= 1  # to a neighbour
    self.assertLess(error(stepped.view(codes.dtype)), tolerance)
    wide = codes.astype(np.float32)
    none = np.where(np.abs(wide) < 30, 0, wide).astype(codes.dtype)
    self.assertEqual(error(none), np.inf)
    self.assertGreater(error((wide * 1.05).astype(codes.dtype)), tolerance)
    self.assertGreater(error(codes, 0.92 * scales), tolerance)
    # Either zero is zero.
    self.assertEqual(
      kernel_timing.worst_error(
        np.zeros(2, codes.dtype), -np.zeros(2, codes.dtype)
      ),
      0,
    )

  def test_a_kernel_of_nan_fails_its_stage(self):
    for broken in (jnp.nan, jnp.inf, 1.5):
      work = Work(
        lambda x, impl, broken=broken: x * broken,
        (jnp.ones(8),),
        lambda x: x,
        0,
        1,
        {},
      )
      case = {'op': ({'s': 0}, lambda shape, work=work: work, lambda s: s)}
      with mock.patch.object(kernel_cases, 'OPS', case):
        row = kernel_stage.checked('op', 's')
      self.assertIn('wrong', row['failed'])
      json.loads(json.dumps(row, allow_nan=False))

  def test_shapes_must_agree(self):
    with self.assertRaisesRegex(ValueError, r'\[1, 3\], not \[3\]'):
      kernel_timing.worst_error(np.ones((1, 3)), np.ones(3))


class FloorTest(parameterized.TestCase):
  @parameterized.parameters('grouped_matmul', 'indexer')
  def test_float8_counts_all_of_its_products_at_twice_the_rate(self, op):
    shapes, _, small = kernel_cases.OPS[op]
    shape = small(next(iter(shapes.values())))
    plain = kernel_cases.OPS[op][1](shape)
    fp8 = kernel_cases.OPS[f'{op}_fp8'][1](shape)
    self.assertLess(fp8.moved, plain.moved)
    self.assertEqual(fp8.flops, plain.flops)
    self.assertEqual((plain.speedup, fp8.speedup), (1, 2))
    rates = {'flops': 1.0, 'bytes': 1e30}
    self.assertEqual(
      kernel_timing.floor_us(plain, rates),
      2 * kernel_timing.floor_us(fp8, rates),
    )
    with mock.patch.object(
      kernel_timing, 'device_us', lambda *_: (1e6, 'cupti')
    ):
      row = next(kernel_timing.time_case(fp8, rates))
    self.assertAlmostEqual(row['tflops'], fp8.flops * 1e-12)

  def test_the_rates_are_of_random_numbers(self):
    seen = []

    def measure(fn, args):
      seen.append(args)
      return 1e6, 'cupti'

    small = lambda key, size, dtype: kernel_timing.jax.random.uniform(
      key, (16,) * len(size), dtype
    )
    with (
      mock.patch.object(kernel_timing, 'device_us', measure),
      mock.patch.object(kernel_timing.jax.random, 'normal', small),
    ):
      rates = kernel_timing.floors()
    self.assertEqual(rates['flops'], 2 * 8192**3)
    arrays = [np.asarray(a, np.float32) for args in seen for a in args]
    for a in arrays:
      self.assertGreater(a.std(), 0.1)
    self.assertGreater(np.abs(arrays[0] - arrays[1]).max(), 0.1)

  def test_without_cupti_the_clock_on_the_wall_counts(self):
    def refuse(*_):
      raise RuntimeError('CUPTI: not here')

    with mock.patch.object(kernel_timing, 'cupti_us', refuse):
      us, how = kernel_timing.device_us(lambda x: x + 1, (jnp.ones(4),))
    self.assertGreater(us, 0)
    self.assertIn('CUPTI: not here', how)
    row = {'op': 'a', 'shape': 'b', 'us': us, 'how': how}
    text = kernel_report.table(kernel_report.Report(rows=[row]))
    self.assertIn('wall clock: CUPTI', text)


if __name__ == '__main__':
  absltest.main()
