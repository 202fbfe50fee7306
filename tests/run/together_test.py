"""Processes of one run are alike before they begin, and end together."""

import shutil
import signal
import time

import pytest
from absl.testing import absltest

from tests.faults import launches, runs


class _Two(runs.RunTest):
  """Two processes of one run."""

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
    codes = launches.end(workers, 240)
    said = '\n'.join(w.said() for w in workers)
    self.assertEqual(codes, [2, 2], msg=said)
    lines = self.errors(workers)
    self.assertLen(lines, 2, msg=said)
    for line in lines:
      self.assertIn(words, line)


class TogetherTest(_Two):
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


@pytest.mark.slow
class EndTest(_Two):
  """Ends that come later, each of two processes that were started anew."""

  def assert_all_end(self, workers, status: int, words: str) -> None:
    codes = launches.end(workers, 240)
    said = [w.said() for w in workers]
    self.assertEqual(codes, [status] * 2, msg='\n'.join(said))
    for text in said:
      self.assertIn(words, text)

  def wait_for(self, word: str, worker) -> None:
    while word not in worker.said():
      self.assertIsNone(worker.process.poll(), msg=worker.said())
      time.sleep(0.05)

  def test_a_signal_before_the_first_step_ends_all(self):
    for number, name in (
      (signal.SIGTERM, 'SIGTERM'),
      (signal.SIGHUP, 'SIGHUP'),
    ):
      for place in ('build', 'choose'):
        with self.subTest(f'{name} {place}'):
          workers = self.start(last=[f'--slow={place}'])
          self.wait_for('stuck', workers[1])
          start = time.monotonic()
          workers[1].process.send_signal(number)
          self.assert_all_end(workers, 143, f'{name} before the first step')
          self.assertLess(time.monotonic() - start, 5)
          shutil.rmtree(self.folder / 'run', ignore_errors=True)

  def test_a_defect_in_one_process_is_one_of_all(self):
    workers = self.start('--every=3', last=['--defect=5'])
    self.assert_all_end(workers, 1, 'error: a defect')
    self.assertNotIn('Traceback', workers[0].said())
    self.assertIn('Traceback', workers[1].said())
    workers = self.start('--every=3')
    self.assertEqual(launches.end(workers), [0, 0], msg=workers[0].said())
    self.assertIn('resumed from step 3', workers[0].said())

  def test_a_closed_terminal_of_one_saves_the_step_in_all(self):
    workers = self.start('--steps=24', '--pause=0.1')
    launches.wait_for_step(self.folder / 'run', 4, workers)
    workers[1].process.send_signal(signal.SIGHUP)
    self.assert_all_end(workers, 77, 'preempted: step')

  def test_a_fault_at_the_end_of_one_finds_the_others_waiting(self):
    workers = self.start('--steps=2', last=['--late'])
    self.assert_all_end(workers, 2, 'error: late')


if __name__ == '__main__':
  absltest.main()
