"""Reports that are drawn anew, alone and beside other runs."""

import json
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from deepseek_jax.cli import redraw
from deepseek_jax.errors import InputError
from deepseek_jax.record import results
from tests.record import fake_run


class ReportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def _run(self, name, scale=1.0):
    path = self.folder / name
    path.mkdir(parents=True)
    fake_run.write_scalars(path, 12, scale)
    (path / 'config.json').write_text('{}')
    return str(path)

  def test_drawn_anew_it_is_the_same_page(self):
    run = self._run('a')
    first = fake_run.write_report(Path(run)).read_bytes()
    Path(run, 'report.html').unlink()
    self.assertEqual(redraw.redrawn([run]).read_bytes(), first)

  def test_curves_of_others_lie_over_those_of_the_run(self):
    run, other = self._run('a'), self._run('b', 2.0)
    alone = fake_run.write_report(Path(run)).read_bytes()
    out = self.folder / 'out.html'
    made = redraw.redrawn([run, other], str(out)).read_text()
    self.assertEqual(Path(run, 'report.html').read_bytes(), alone)
    for words in (
      'a</bdi> <b>0.4167</b>', 'b</bdi> <b>0.8333</b>',
      'b, validation</bdi> <b>0.9167</b>',
      'Beside this run: b.', 'A run &lt;/pre&gt;',
    ):  # fmt: skip
      self.assertIn(words, made)

  def test_of_files_that_are_there_only_such_a_page_is_replaced(self):
    run, out = self._run('a'), self.folder / 'mine.html'
    first = redraw.redrawn([run], str(out)).read_bytes()
    self.assertEqual(redraw.redrawn([run], str(out)).read_bytes(), first)
    for text in ('my notes', '<p class="kicker">Comparison</p>', ''):
      out.write_text(text)
      with self.assertRaisesRegex(InputError, '^--out=.* is not a report; '):
        redraw.redrawn([run], str(out))
      self.assertEqual(out.read_text(), text)

  def test_a_file_where_the_page_is_written_first_stays(self):
    run, mine = self._run('a'), self.folder / 'mine.tmp'
    mine.write_text('notes')
    with self.assertRaisesRegex(InputError, 'mine.tmp is there, which writing'):
      redraw.redrawn([run], str(self.folder / 'mine.html'))
    self.assertEqual(mine.read_text(), 'notes')

  def test_a_folder_of_runs_stands_for_them_but_not_for_the_run_itself(self):
    run = self._run('sweep/a')
    self._run('sweep/b')
    made = redraw.redrawn([run, str(self.folder / 'sweep')]).read_text()
    self.assertIn('Beside this run: b.', made)

  def test_runs_of_one_name_are_told_apart(self):
    folders = [Path(self._run(name)) for name in ('x/a', 'y/a', 'b')]
    made = redraw.named([*folders, self.folder / 'x' / '..' / 'b'])
    self.assertEqual(list(made), ['x/a', 'y/a', 'b'])

  def test_a_run_that_has_not_ended_is_drawn(self):
    run = self._run('a')
    page = redraw.redrawn([run]).read_text()
    self.assertIn('This run has not ended.', page)
    self.assertIn('Loss, nats per token', page)

  def test_a_run_of_before_reports_were_kept_shows_its_results(self):
    run = self._run('a')
    held = {'bits_per_byte': 1.25, 'baselines': {'xz': 2.5}, 'documents': 3}
    results.write(Path(run), {'heldout': held})
    page = redraw.redrawn([run]).read_text()
    for words in ('held-out bits per byte', '1.25', 'xz -9 bits per byte'):
      self.assertIn(words, page)

  @parameterized.parameters(
    ([], None, 'give the folder of a run'),
    (['nowhere'], None, 'nowhere: holds no run'),
    (['a', 'nowhere'], None, 'nowhere: is no folder'),
    (['a'], 'no/where.html', 'there is no folder no'),
  )
  def test_wrong_arguments_are_one_line(self, given, out, message):
    run = self._run('a')
    given = [run if name == 'a' else name for name in given]
    with self.assertRaisesRegex(InputError, message):
      redraw.redrawn(given, out)

  @parameterized.parameters(
    '[]', '{}', '{"title": 1, "facts": [1]}', '{"title": "x", "color": "y"}',
    '{"title": "x", "samples": [{"html": "y"}]}', 'x',
    '{"title": "x", "samples": [7]}', '{"title": "x", "notes": 7}',
  )  # fmt: skip
  def test_a_damaged_file_is_named(self, text):
    run = self._run('a')
    Path(run, 'report.json').write_text(text)
    with self.assertRaisesRegex(InputError, r'report\.json'):
      redraw.redrawn([run])

  def test_what_a_report_keeps_is_text(self):
    run = self._run('a')
    told = {
      'title': fake_run.HOSTILE,
      'facts': [[fake_run.HOSTILE, 7, fake_run.HOSTILE]],
      'samples': [{'prompt': fake_run.HOSTILE, 'text': 'x'}],
      'notes': [fake_run.HOSTILE],
    }
    Path(run, 'report.json').write_text(json.dumps(told))
    page = redraw.redrawn([run]).read_text()
    self.assertNotIn('<img', page)
    self.assertGreater(page.count('&lt;img'), 5)


if __name__ == '__main__':
  absltest.main()
