"""Contests: what one machine measured stays when another one measures."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from benchmarks import contest


def _rows(jax: str, ratio: float) -> list[dict]:
  return [{'ours': {'versions': {'jax': jax}}, 'ratio': ratio}]


class KeepTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(tempfile.mkdtemp(), 'train.json')

  def run_on(self, machine, jax, ratio):
    with mock.patch.object(contest, 'processor', lambda: machine):
      contest.keep(self.path, _rows(jax, ratio))
    runs = json.loads(self.path.read_text())['runs']
    return {(r['machine'], r['jax']): r['rows'][0]['ratio'] for r in runs}

  def test_a_run_replaces_that_of_its_processor_and_jax_alone(self):
    self.assertEqual(self.run_on('A', '0.10.2', 1.0), {('A', '0.10.2'): 1.0})
    self.run_on('B', '0.10.2', 2.0)
    self.run_on('A', '0.12.0', 3.0)
    found = self.run_on('A', '0.10.2', 4.0)
    want = {('A', '0.10.2'): 4.0, ('A', '0.12.0'): 3.0, ('B', '0.10.2'): 2.0}
    self.assertEqual(found, want)

  def test_a_run_says_when_where_and_of_which_code(self):
    self.run_on('A', '0.10.2', 1.0)
    (run,) = json.loads(self.path.read_text())['runs']
    self.assertRegex(run['date'], r'^\d{4}-\d\d-\d\d$')
    self.assertRegex(run['commit'], r'^(unknown|[0-9a-f]{7,}\+?)$')


if __name__ == '__main__':
  absltest.main()
