"""The module that a configuration file becomes, and its name."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from deepseek_jax import own_classes
from deepseek_jax.cli import experiment_file

_CLASS = """import dataclasses

@dataclasses.dataclass(frozen=True)
class Own:
  width: int = {}
"""


class ExperimentFileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    holder = tempfile.TemporaryDirectory()
    self.addCleanup(holder.cleanup)
    self.folder = Path(holder.name)
    self.enterContext(mock.patch.dict(sys.modules))

  def write(self, name: str, text: str) -> str:
    path = self.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)

  def kind(self, module) -> dict:
    return {'kind': f'{module.Own.__module__}:Own'}

  def test_is_called_as_the_file_and_keeps_the_hash_of_what_ran(self):
    path = self.write('my_idea.py', _CLASS.format(1))
    module = experiment_file.load(path)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    self.assertEqual(self.kind(module), {'kind': 'my_idea:Own'})
    self.assertIs(own_classes.find('my_idea:Own'), module.Own)
    self.write('my_idea.py', _CLASS.format(2))  # what ran is what counts
    self.assertEqual(
      own_classes.sources([self.kind(module)]),
      {'my_idea': {'file': 'my_idea.py', 'sha256': digest}},
    )

  def test_runs_once_and_again_when_the_file_is_another(self):
    path = self.write('my_idea.py', _CLASS.format(1))
    first = experiment_file.load(path)
    self.assertIs(experiment_file.load(path), first)
    self.write('my_idea.py', _CLASS.format(2))
    self.assertEqual(experiment_file.load(path).Own().width, 2)

  def test_an_import_of_the_same_file_is_the_same_module(self):
    path = self.write('my_idea.py', _CLASS.format(1))
    with mock.patch.object(sys, 'path', [str(self.folder), *sys.path]):
      import my_idea
    self.assertIs(experiment_file.load(path), my_idea)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    source = own_classes.sources(self.kind(my_idea))['my_idea']
    self.assertEqual(source['sha256'], digest)

  @parameterized.parameters('json', 'ast', 'my-idea', 'numpy', 'jax', '1st')
  def test_a_taken_name_is_refused_for_classes_alone(self, name):
    there = sys.modules.get(name)
    path = self.write(f'{name}.py', _CLASS.format(1))
    module = experiment_file.load(path)
    self.assertIs(sys.modules.get(name), there)
    experiment_file.check_name({'width': 3, 'kind': 'gqa'}, path)
    with self.assertRaisesRegex(ValueError, f'{name}:Own; .* rename the file'):
      experiment_file.check_name({'a': [self.kind(module)]}, path)

  def test_two_files_of_one_name_are_two_modules(self):
    one = experiment_file.load(self.write('a/my_idea.py', _CLASS.format(1)))
    path = self.write('b/my_idea.py', _CLASS.format(2))
    other = experiment_file.load(path)
    self.assertEqual([one.Own().width, other.Own().width], [1, 2])
    self.assertIs(own_classes.find('my_idea:Own'), one.Own)
    with self.assertRaisesRegex(ValueError, 'my_idea is another module'):
      experiment_file.check_name(self.kind(other), path)

  def test_a_file_that_fails_leaves_no_module(self):
    path = self.write('my_idea.py', _CLASS.format(1) + '1 / 0\n')
    with self.assertRaises(ZeroDivisionError):
      experiment_file.load(path)
    self.assertNotIn('my_idea', sys.modules)
    self.assertIsNone(own_classes.find('my_idea:Own'))


class KindsTest(absltest.TestCase):
  def test_finds_users_classes_anywhere(self):
    plain = {
      'a': {'kind': 'gqa', 'b': ({'kind': 'mine:X'}, 3)},
      'kinds': {'kind': {'ffn': 'moe', 'change': [['x', {'kind': 'm.y:Z'}]]}},
      'c': {'kind': 'deepseek_jax.model.attention.gqa:GQAConfig'},
      'd': 'mine:no_kind',
    }
    self.assertEqual(
      own_classes.kinds(json.loads(json.dumps(plain))),
      {'a.b[0]': 'mine:X', 'kinds.kind.change[0][1]': 'm.y:Z'},
    )

  def test_damaged_code_is_no_crash(self):
    now = {'mine': {'file': 'mine.py', 'sha256': 'b'}}
    for code in ({'mine': 3}, {'mine': {}}, {'mine': {'sha256': 7}}, {}):
      own_classes.check_same(code, now, 'here', 'fix')
      with self.assertRaisesRegex(ValueError, 'import gone first'):
        own_classes.check_loaded({'x': {'kind': 'gone:X'}}, code, 'here')


if __name__ == '__main__':
  absltest.main()
