"""Processes of one run are alike before they begin, and end together."""

import shutil

from absl.testing import absltest, parameterized

from tests.faults import launches, runs


class TogetherTest(runs.RunTest, parameterized.TestCase):
  def start(self, *flags: str, **shape) -> list[launches.Worker]:
    return launches.start(self.folder / 'run', *flags, count=2, **shape)

  def errors(self, workers) -> list[str]:
    """The line of each process that says why it ended."""
    said = [worker.said() for worker in workers]
    for text in said:
      self.assertNotIn('Traceback', text)
    return [
      line
      for text in said
      for line in text.splitlines()
      if line.startswith('error: ')
    ]

  def assert_all_refuse(self, workers, words: str) -> None:
    codes = launches.end(workers, 100)
    said = '\n'.join(w.said() for w in workers)
    self.assertEqual(codes, [2, 2], msg=said)
    lines = self.errors(workers)
    self.assertLen(lines, 2, msg=said)
    for line in lines:
      self.assertIn(words, line)

  def test_fields_that_may_change_may_not_differ_between_processes(self):
    workers = self.start('--every=3', last=['--change=evaluate.every=4'])
    self.assert_all_refuse(
      workers, 'evaluate.every: 0 in process 0, 4 in process 1'
    )
    self.assertFalse((self.folder / 'run').exists())

  def test_another_text_in_one_process_is_refused_before_a_step(self):
    # Each node has its own files below one path.
    homes = [self.folder / 'node0', self.folder / 'node1']
    for home in homes:
      shutil.copytree(runs.home() / 'corpus', home / 'corpus')
    with (homes[1] / 'corpus' / 'part0.py').open('a') as file:
      file.write('x = 1\n' * 50)
    workers = self.start('--change=data.path="~/corpus"', homes=homes)
    self.assert_all_refuse(workers, 'process 1 reads another text than process')
    self.assertFalse((self.folder / 'run' / 'metrics.jsonl').exists())

  def test_what_the_first_alone_finds_ends_all(self):
    (self.folder / 'run').mkdir()
    (self.folder / 'run' / 'thesis.tex').write_text('precious')
    self.assert_all_refuse(self.start(), 'is not empty and holds no run')


if __name__ == '__main__':
  absltest.main()
