"""The bug zoo: every patch applies, and the fast ones are noticed."""

import re
import subprocess
import sys

from absl.testing import absltest, parameterized

from tests.mutants import run
from tests.mutants.catalog import MUTANTS
from tests.mutants.mutant import ROOT, Mutant, mutated, selection


class CatalogTest(parameterized.TestCase):
  def test_every_patch_applies_to_the_present_code(self):
    for mutant in MUTANTS:
      with self.subTest(mutant.name):
        text = mutated(mutant, (ROOT / mutant.path).read_text())
        if mutant.path.endswith('.py'):  # others are pages and templates
          compile(text, mutant.path, 'exec')

  def test_every_mutant_names_tests_that_exist(self):
    for mutant in MUTANTS:
      with self.subTest(mutant.name):
        self.assertNotEmpty(mutant.tests)
        for test in mutant.tests:
          file, _, name = test.partition('::')
          # Numbers at the end are those of parameterized cases.
          stem = name.rstrip('0123456789')
          text = (ROOT / file).read_text()
          self.assertTrue(re.search(rf'def \w*{stem}', text), test)

  def test_names_are_unique_and_there_are_enough(self):
    names = [m.name for m in MUTANTS]
    self.assertLen(set(names), len(names))
    self.assertGreaterEqual(len(names), 25)
    fast = sum(m.fast for m in MUTANTS)
    self.assertBetween(fast, 12, len(names) // 2)

  @parameterized.parameters(('a b', 'x'), ('a', 'a'))
  def test_a_patch_that_does_not_apply_is_named(self, text, new):
    mutant = Mutant('bug', 'file.py', 'a', new, ('t::t',), '')
    self.assertEqual(mutated(mutant._replace(new='c'), 'a b'), 'c b')
    with self.assertRaisesRegex(ValueError, 'bug: its old text occurs'):
      mutated(mutant, text + ' a')

  def test_tests_are_selected_by_file_and_name(self):
    self.assertEqual(
      selection(('a.py::x', 'b.py::y', 'a.py::y')),
      ['a.py', 'b.py', '-k', 'x or y'],
    )


class VerdictTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, '1 passed', 'survived'),
    (1, 'FAILED t.py::T::test_a - AssertionError: 1 != 2', 'killed'),
    (1, 'FAILED t.py::T::test_a - assert 1 == 2', 'killed'),
    (1, 'FAILED t.py::T::test_a - NameError: x', 'crashed: NameError: x'),
    (1, 'SUBFAILED[a b] t.py::T::test_a - AssertionError: 1', 'killed'),
    (1, "SUBFAILED(n='a - b') t.py::T::test_a - assert 1 == 2", 'killed'),
    (1, 'SUBFAILED(n=1) t.py::T::test_a - NameError: x', 'crashed: NameE.*'),
    (1, 'ERROR t.py', 'no verdict .status 1.: ERROR t.py'),
    (2, 'ImportError\n1 error', 'no verdict .status 2.: 1 error'),
    (5, '3 deselected', 'no verdict .status 5.: 3 deselected'),
    (-1, 'no end after 9 s', 'no verdict .status -1.: no end after 9 s'),
  )
  def test_only_a_failed_assertion_kills(self, status, output, want):
    self.assertRegex(run.verdict(status, output), f'^{want}$')


class FastTest(absltest.TestCase):
  def test_the_fast_mutants_are_killed(self):
    done = subprocess.run(
      [sys.executable, '-m', 'tests.mutants.run', '--fast', '--jobs=1'],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stdout)


if __name__ == '__main__':
  absltest.main()
