"""Checks that what commands write takes the place of nothing else."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from deepseek_jax.cli import outputs
from deepseek_jax.errors import InputError
from tests.record import fake_run


class OutputsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  @parameterized.parameters(
    ('none/x', 'there is no folder .*none; make it first'),
    ('.', 'is a folder; name a file in it'),
    ('notes', 'is there and is not a page; name another file or take it away'),
  )
  def test_a_place_that_is_none_is_named(self, name, message):
    (self.folder / 'notes').write_text('mine')
    path = self.folder / name
    with self.assertRaisesRegex(InputError, f'^--out={path}: {message}$'):
      outputs.check('out', path, 'a page', outputs.is_page('Page'))

  def test_files_of_a_kind_are_known(self):
    pairs = outputs.is_json('a', 'b'), outputs.is_json_of('a', 'b')
    for one, each, text in (
      (True, False, '{"a": 1, "b": 2, "c": 3}'),
      (False, True, '{"x": {"a": 1, "b": 2}}'),
      (False, False, '{"x": {"a": 1, "b": 2}, "y": 1}'),
      (False, False, '{"a": 1}'),
      (False, False, '{}'),
      (False, False, '[1]'),
      (False, False, 'a, b'),
      (False, False, '[' * 100_000),
    ):
      self.assertEqual([f(text) for f in pairs], [one, each], text[:40])

  @parameterized.parameters(
    ('compare', 'RUN', '--metric=loss', '--out=FILE'),
    ('compare', 'RUN', '--metric=loss', '--out=RUN/page', '--json=FILE'),
    ('plan', '--config=v3_tiny', '--json=FILE'),
    ('verify', '--hf=RUN', '--out=FILE'),
  )
  def test_a_command_leaves_what_is_not_its_own(self, verb, *flags):
    run, file = self.folder / 'run', self.folder / 'file'
    run.mkdir()
    fake_run.write_scalars(run, 12, 1.0)
    (run / 'config.json').write_text('{}')
    # That of another folder.
    text = json.dumps({'passed': True, 'folder': '/else', 'cases': []})
    file.write_text(text)
    put = lambda f: f.replace('RUN', str(run)).replace('FILE', str(file))
    done = subprocess.run(
      [sys.executable, '-m', f'experiments.{verb}', *map(put, flags)],
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertRegex(done.stderr, f'={file}: is there and is not a')
    self.assertEqual(file.read_text(), text)
    self.assertFalse((run / 'page').exists())


if __name__ == '__main__':
  absltest.main()
