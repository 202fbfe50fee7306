"""The record of a run is complete, exact, resumable; progress is one line."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import unittest.mock
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.record import metrics


def _run(workdir, steps, resume_step=None):
  with metrics.MetricsWriter(
    workdir, console=False, resume_step=resume_step
  ) as writer:
    for step in steps:
      writer.write(step, {'loss': 1 / (step + 1)}, {'seconds': 0.1 * step})
      if step % 4 == 0:
        writer.write(step, {'validation_loss': 2 / (step + 1)})


class _Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = Path(folder.name)


class RecordTest(_Case):
  def test_values_come_back_exactly(self):
    row = {'loss': 1 / 3, 'tokens': 2**60 + 1, 'grad_norm': 5e-324}
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(7, row)
    self.assertEqual(metrics.read(self.workdir), [{'step': 7, **row}])

  @parameterized.parameters(
    (np.float32(0.1), float(np.float32(0.1))),
    (np.int64(3), 3),
    (jnp.float32(2.5), 2.5),
    (jnp.bfloat16(1.5), 1.5),
    (jnp.int32(4), 4),
    (np.array([0.25]), 0.25),
    (True, 1),
  )
  def test_array_scalars_become_numbers(self, value, expected):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(np.int32(1), {'x': value})
    self.assertEqual(metrics.read(self.workdir), [{'step': 1, 'x': expected}])

  def test_not_finite_values_are_kept_in_strict_json(self):
    row = {'a': math.nan, 'b': math.inf, 'c': -math.inf, 'd': 1.0}
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(1, row)
    text = (self.workdir / 'metrics.jsonl').read_text()
    forbid = unittest.mock.Mock(side_effect=AssertionError)
    strict = json.loads(text, parse_constant=forbid)
    self.assertEqual(
      strict, {'step': 1, 'a': 'NaN', 'b': 'Infinity', 'c': '-Infinity', 'd': 1}
    )
    np.testing.assert_equal(metrics.read(self.workdir), [{'step': 1, **row}])

  def test_a_line_is_on_disk_before_the_next_step(self):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      writer.write(1, {'loss': 3.0})
      self.assertLen(metrics.read(self.workdir), 1)

  def test_clock_values_stay_out_of_the_reproducible_file(self):
    for folder, seconds in (('a', 0.1), ('b', 0.2)):
      with metrics.MetricsWriter(
        self.workdir / folder, console=False
      ) as writer:
        writer.write(1, {'loss': 3.0}, {'seconds': seconds})
    a, b = (self.workdir / f / 'metrics.jsonl' for f in 'ab')
    self.assertEqual(a.read_bytes(), b.read_bytes())
    timings = metrics.read(self.workdir / 'b', 'timings')
    self.assertEqual(timings, [{'step': 1, 'seconds': 0.2}])

  def test_no_run_reads_as_empty(self):
    self.assertEqual(metrics.read(self.workdir), [])

  @parameterized.parameters(
    (np.zeros(2), r"scalars\['x'\] must be one number.*\(2,\)"),
    ('high', r"scalars\['x'\] must be one number"),
    (None, r"scalars\['x'\] must be one number"),
    (1j, r"scalars\['x'\] must be one number"),
  )
  def test_what_is_no_number_is_refused_by_name(self, value, message):
    with metrics.MetricsWriter(self.workdir, console=False) as writer:
      with self.assertRaisesRegex(InputError, message):
        writer.write(1, {'x': value})
      with self.assertRaisesRegex(InputError, 'is taken'):
        writer.write(1, {'step': 1})
    self.assertEqual(metrics.read(self.workdir), [])


class ResumeTest(_Case):
  @parameterized.parameters(0, 3, 4, 8, 9)
  def test_resumed_run_equals_straight_run(self, restored):
    straight, resumed = self.workdir / 'straight', self.workdir / 'resumed'
    _run(straight, range(12))
    _run(resumed, range(10))
    _run(resumed, range(restored + 1, 12), resume_step=restored)
    for name in metrics.FILES.values():
      self.assertEqual(
        (resumed / name).read_bytes(), (straight / name).read_bytes()
      )

  def test_resume_before_the_first_step_drops_all(self):
    _run(self.workdir, range(5))
    _run(self.workdir, [0], resume_step=-1)
    self.assertLen(metrics.read(self.workdir), 2)

  def test_without_resume_step_lines_are_appended(self):
    _run(self.workdir, [1, 2])
    _run(self.workdir, [2, 3])
    steps = [row['step'] for row in metrics.read(self.workdir)]
    self.assertEqual(steps, [1, 2, 2, 3])

  def test_a_step_back_is_refused(self):
    _run(self.workdir, [1, 5])
    with self.assertRaisesRegex(InputError, 'step=3 .* pass resume_step=2'):
      _run(self.workdir, [3])

  @parameterized.parameters(None, 2)
  def test_a_line_cut_by_a_crash_is_dropped(self, resume_step):
    _run(self.workdir, [1, 2])
    path = self.workdir / 'metrics.jsonl'
    with path.open('a') as file:
      file.write('{"step": 3, "lo')
    self.assertLen(metrics.read(self.workdir), 2)
    _run(self.workdir, [3], resume_step=resume_step)
    steps = [row['step'] for row in metrics.read(self.workdir)]
    self.assertEqual(steps, [1, 2, 3])

  @parameterized.parameters('oops', '[1]', '{"loss": 1}', '{"step": "x"}', '')
  def test_a_foreign_line_is_an_error_with_its_number(self, line):
    _run(self.workdir, [1])
    with (self.workdir / 'metrics.jsonl').open('a') as file:
      file.write(line + '\n')
    with self.assertRaisesRegex(InputError, r'metrics\.jsonl, line 2 is not'):
      metrics.read(self.workdir)
    with self.assertRaisesRegex(InputError, r'metrics\.jsonl, line 2 is not'):
      _run(self.workdir, [2], resume_step=1)


class ProgressTest(_Case):
  def test_plain_lines_where_there_is_no_terminal(self):
    out, clock = io.StringIO(), [0.0]
    with (
      contextlib.redirect_stdout(out),
      unittest.mock.patch('time.monotonic', lambda: clock[0]),
      metrics.MetricsWriter(self.workdir, total_steps=40) as writer,
    ):
      for step in range(1, 41):
        clock[0] += 1.0 if step > 1 else 100.0  # the first compiles
        writer.write(step, {'loss': 2.0, 'lr': 1e-4}, {'tokens_per_s': 12345.6})
        if step == 5:
          writer.log('hello')
    self.assertEqual(
      out.getvalue().splitlines(),
      [
        'step 1/40  loss 2  lr 1.00e-04  tokens_per_s 12,346',
        'hello',
        'step 11/40  loss 2  lr 1.00e-04  tokens_per_s 12,346  left 0:00:29',
        'step 21/40  loss 2  lr 1.00e-04  tokens_per_s 12,346  left 0:00:19',
        'step 31/40  loss 2  lr 1.00e-04  tokens_per_s 12,346  left 0:00:09',
        'step 40/40  loss 2  lr 1.00e-04  tokens_per_s 12,346',
      ],
    )

  def test_the_last_step_of_an_open_run_is_shown(self):
    out = io.StringIO()
    with (
      contextlib.redirect_stdout(out),
      metrics.MetricsWriter(self.workdir) as writer,
    ):
      for step in range(1, 8):
        writer.write(step, {'loss': math.nan})
    self.assertEqual(
      out.getvalue().splitlines(), ['step 1  loss nan', 'step 7  loss nan']
    )

  def test_the_newest_of_every_value_is_shown_and_the_speed_always(self):
    out = io.StringIO()
    with (
      contextlib.redirect_stdout(out),
      metrics.MetricsWriter(self.workdir) as writer,
    ):
      writer.write(1, dict.fromkeys('abcdef', 1), {'tokens_per_second': 7})
      writer.write(2, {'b': 2}, {'tokens_per_second': 8})
      writer.write(2, {'d': 3})
    self.assertEqual(
      out.getvalue().splitlines(),
      [
        'step 1  a 1  b 1  c 1  d 1  tokens_per_second 7',
        'step 2  a 1  b 2  c 1  d 3  tokens_per_second 8',
      ],
    )

  def test_console_off_prints_nothing(self):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      _run(self.workdir, [1, 2])
    self.assertEqual(out.getvalue(), '')

  def test_one_line_is_redrawn_on_a_terminal(self):
    with (
      _terminal(100) as screen,
      metrics.MetricsWriter(self.workdir, total_steps=3) as writer,
    ):
      for step in 1, 2, 3:
        writer.write(step, {'loss': 1 / step, '[red]': 2})
        writer.log(f'a [bold] note {step}')
    *notes, last = _rows(screen)
    self.assertEqual(notes, [f'a [bold] note {i}' for i in (1, 2, 3)])
    self.assertRegex(last, r'^3/3 .* loss 0\.3333  \[red\] 2$')

  def test_a_narrow_terminal_cuts_the_values_not_the_count(self):
    with (
      _terminal(72) as screen,
      metrics.MetricsWriter(self.workdir, total_steps=2000) as writer,
    ):
      writer.write(1800, {f'scalar_{n}': 1.2345 for n in range(5)})
    [row] = _rows(screen)
    self.assertRegex(row, r'^1800/2000 .* scalar_0 1\.23.*…$')
    self.assertLessEqual(len(row), 72)


class TensorBoardTest(_Case):
  def test_event_files_hold_the_scalars(self):
    with metrics.MetricsWriter(
      self.workdir, console=False, tensorboard=True
    ) as writer:
      writer.write(1, {'loss': 3.0}, {'seconds': 0.5})
    [path] = (self.workdir / 'tensorboard').glob('events*')
    events = path.read_bytes()
    self.assertIn(b'loss', events)
    self.assertIn(b'timings/seconds', events)

  def test_a_missing_tensorboardx_is_named_with_its_fix(self):
    hide = unittest.mock.patch.dict(sys.modules, tensorboardX=None)
    with hide, self.assertRaisesRegex(InputError, 'pip install tensorboardX'):
      metrics.MetricsWriter(self.workdir, console=False, tensorboard=True)

  def test_import_is_light(self):
    program = (
      'import sys, deepseek_jax; before = set(sys.modules);'
      'from deepseek_jax.record import metrics, routing;'
      'from deepseek_jax.record.report import page;'
      'print(*{m.split(".")[0] for m in set(sys.modules) - before})'
    )
    out = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, check=True
    )
    heavy = {'rich', 'matplotlib', 'jinja2', 'tensorboardX'}
    self.assertEmpty(heavy & set(out.stdout.decode().split()))


class _Screen(io.StringIO):
  def isatty(self):
    return True


@contextlib.contextmanager
def _terminal(columns: int):
  """What a program prints to a terminal of so many columns."""
  screen = _Screen()
  env = {'TERM': 'xterm', 'COLUMNS': str(columns), 'LINES': '40'}
  with (
    unittest.mock.patch.dict(os.environ, env),
    contextlib.redirect_stdout(screen),
  ):
    yield screen


def _rows(screen: io.StringIO) -> list[str]:
  """The rows that the terminal shows in the end."""
  return [row for row in _replay(screen.getvalue()) if row]


def _replay(text: str) -> list[str]:
  """A terminal of the few control codes that redraw a line."""
  rows, row, i = [''], 0, 0
  while i < len(text):
    if text[i] == '\x1b':
      end = i + 1
      while not text[end].isalpha():
        end += 1
      code, argument = text[end], text[i + 2 : end]
      if code == 'A':
        row -= int(argument or 1)
      elif code == 'K':
        rows[row] = ''
      i = end + 1
      continue
    if text[i] == '\n':
      row += 1
      rows += [''] * (row + 1 - len(rows))
    elif text[i] == '\r':
      # Text after a carriage return is a new drawing of the row.
      if text[i + 1 : i + 2] not in ('\n', '\r', '\x1b'):
        rows[row] = ''
    else:
      rows[row] += text[i]
    i += 1
  return [row.rstrip() for row in rows]


if __name__ == '__main__':
  absltest.main()
