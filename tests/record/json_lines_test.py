"""Tests files of JSON lines: what is read, what is damaged, what was cut."""

import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from deepseek_jax.record.json_lines import read_lines


def _step(row):
  """Returns the step of a row, doubled."""
  return 2 * row['step'].__index__()


class ReadLinesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = Path(folder, 'rows.jsonl')

  def _read(self, data, **kwargs):
    self.path.write_bytes(data)
    return read_lines(self.path, _step, **kwargs)

  def test_a_file_that_is_absent_has_no_lines(self):
    self.assertEqual(read_lines(self.path, _step), ([], []))

  def test_lines_keep_their_bytes(self):
    rows, damaged = self._read(b'{"step":  1}\n{"step": 2}\n')
    self.assertEqual(rows, [(b'{"step":  1}', 2), (b'{"step": 2}', 4)])
    self.assertEqual(damaged, [])

  @parameterized.parameters(
    b'{"step": 1',
    b'',
    b'[1]',
    b'7',
    b'null',
    b'{}',
    b'{"step": "1"}',
    b'{"step": 1.5}',
    b'\xff\xfe',
    b'\x00' * 9,
    b'[' * 100_000,
  )
  def test_a_damaged_line_is_numbered_and_the_others_are_read(self, line):
    rows, damaged = self._read(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    self.assertEqual([row for _, row in rows], [2, 4])
    self.assertEqual(damaged, [(2, line)])

  def test_a_last_line_that_was_cut_is_neither(self):
    rows, damaged = self._read(b'{"step": 1}\n{"st')
    self.assertEqual(([row for _, row in rows], damaged), ([2], []))

  def test_a_file_written_whole_has_no_line_that_was_cut(self):
    rows, damaged = self._read(b'{"step": 1}\n{"st', appended=False)
    self.assertEqual([row for _, row in rows], [2])
    self.assertEqual(damaged, [(2, b'{"st')])

  def test_other_errors_of_a_parser_are_not_hidden(self):
    self.path.write_bytes(b'{}\n')
    with self.assertRaises(ZeroDivisionError):
      read_lines(self.path, lambda row: 1 / 0)


if __name__ == '__main__':
  absltest.main()
