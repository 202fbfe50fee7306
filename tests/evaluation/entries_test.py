"""Evaluations are appended to results.json, which keeps what a run reached."""

import json
import shutil
import tempfile
from pathlib import Path

from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.cli import finish
from deepseek_jax.evaluation import entries
from deepseek_jax.record import results

ENTRY = {
  'what': 'pass@k',
  'source': 'task.json',
  'most': 8,
  'pass': {'1': {'value': 0.25, 'interval': [0.0, 0.5], 'problems': 4}},
  'unfinished': 0.125,
  'verifier_errors': 2,
  'reward': float('nan'),
}


class EntriesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.folder)

  def test_what_a_run_reached_stays_and_an_equal_one_is_not_repeated(self):
    results.write(self.folder, {'steps': 3})
    for entry in (ENTRY, ENTRY, ENTRY | {'step': 4}):
      entries.add(self.folder, entry)
    found = results.read(self.folder)
    self.assertEqual(found['steps'], 3)
    self.assertLen(found['evaluations'], 2)
    self.assertEqual(found['evaluations'][0]['reward'], 'nan')
    # Trained on, it keeps them.
    self.assertLen(finish._written(self.folder)['evaluations'], 2)

  def test_a_launch_without_a_step_keeps_speed_and_memory(self):
    on = lambda device, ended: {'device': device, 'ended': ended}
    now = {
      'machine': on('cpu', 'today'),
      'tokens_per_second': None,
      'peak_memory_bytes': 5,
    }
    before = {
      'machine': on('cpu', 'yesterday'),
      'tokens_per_second': 9.0,
      'peak_memory_bytes': 7,
    }
    kept = finish._with_earlier(now, before)
    self.assertEqual(kept, {**before, 'machine': now['machine']})
    faster = finish._with_earlier({**now, 'tokens_per_second': 8.0}, before)
    self.assertEqual(faster['tokens_per_second'], 8.0)
    other = {**before, 'machine': on('gpu', 'yesterday')}
    self.assertEqual(finish._with_earlier(now, other), now)
    self.assertEqual(finish._with_earlier(now, {}), now)

  def test_evaluations_alone_are_no_end_of_a_run(self):
    entries.add(self.folder / 'new', ENTRY)
    self.assertIsNone(results.read(self.folder / 'new'))
    self.assertIsNone(results.read(self.folder))
    self.assertEqual(finish._written(self.folder), {})

  def _made(self, folder):
    folder.mkdir()
    return folder

  def test_a_damaged_file_is_not_overwritten(self):
    path = self.folder / results.FILE
    path.write_text('{"steps": ')
    with self.assertRaisesRegex(ds.InputError, 'results.json: not valid JSON'):
      entries.add(self.folder, ENTRY)
    self.assertEqual(path.read_text(), '{"steps": ')
    other = self.folder / 'other'
    results.write(self._made(other), {results.EVALUATIONS: {'a': 1}})
    with self.assertRaisesRegex(ds.InputError, 'evaluations is no list'):
      entries.add(other, ENTRY)
    self.assertEqual(finish._written(self.folder), {})
    aside = [p for p in self.folder.iterdir() if 'damaged' in p.name]
    self.assertEqual([p.read_text() for p in aside], ['{"steps": '])

  def test_the_table_and_the_notes_have_every_number(self):
    more = {
      'what': 'choices',
      'source': 'quiz.jsonl',
      'questions': 5,
      'accuracy': {'value': 0.4, 'interval': [0.1, 0.7]},
      'accuracy_by_bytes': {'value': 0.6, 'interval': [0.2, 0.9]},
    }
    bits = {'what': 'bits', 'source': 'x', 'bits_per_byte': 2.5, 'bytes': 9}
    rows = [n for e in (ENTRY, more, bits) for n in entries.numbers(e)]
    self.assertEqual(
      [row[:2] for row in rows],
      [
        ('pass@1', 0.25),
        ('accuracy', 0.4),
        ('accuracy_by_bytes', 0.6),
        ('bits per byte', 2.5),
      ],
    )
    self.assertEqual(entries.table([ENTRY, more, bits]).row_count, 4)
    notes = ' '.join(entries.notes(ENTRY))
    self.assertIn('12.5% of the answers had no end at 8 tokens', notes)
    self.assertIn('2 verifier errors', notes)
    json.dumps(entries.notes(more))


if __name__ == '__main__':
  absltest.main()
