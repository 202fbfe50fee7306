"""Checks what is shipped: licence, metadata, files, the console script."""

import email
import hashlib
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.cli import main as program
from tests.package import run as package

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_RUN = _ROOT / 'tests' / 'package' / 'run.py'
# Of the text at apache.org/licenses, without the empty line before it.
_APACHE = 'c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4'


class WheelTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.zip = zipfile.ZipFile(package.wheel(pathlib.Path(folder)))
    (about,) = [n for n in cls.zip.namelist() if n.endswith('/METADATA')]
    cls.info = about.rpartition('/')[0]
    cls.metadata = email.message_from_bytes(cls.zip.read(about))

  def test_it_holds_the_two_packages_and_nothing_else(self):
    tops = {name.split('/')[0] for name in self.zip.namelist()}
    self.assertEqual(tops, package.PACKAGES | {self.info})

  def test_it_holds_every_module_and_what_the_report_is_made_of(self):
    there = set(self.zip.namelist())
    for name in package.PACKAGES:
      for path in (_ROOT / name).rglob('*.py'):
        self.assertIn(str(path.relative_to(_ROOT)), there)
      self.assertIn(f'{name}/py.typed', there)
    templates = (_ROOT / 'deepseek_jax/record/report/templates').iterdir()
    for path in templates:
      self.assertIn(str(path.relative_to(_ROOT)), there)

  def test_metadata_say_what_one_may_do_with_it(self):
    self.assertEqual(self.metadata['License-Expression'], 'Apache-2.0')
    self.assertEqual(self.metadata['License-File'], 'LICENSE')
    self.assertEqual(self.metadata['Author'], 'the deepseek_jax authors')
    self.assertEqual(self.metadata['Version'], ds.__version__)
    self.assertIn('Typing :: Typed', self.metadata.get_all('Classifier'))
    kept = self.zip.read(f'{self.info}/licenses/LICENSE')
    self.assertEqual(kept, (_ROOT / 'LICENSE').read_bytes())
    digest = hashlib.sha256(kept.replace(b'\r', b'')).hexdigest()
    self.assertEqual(digest, _APACHE)

  def test_it_needs_nothing_that_only_tests_import(self):
    needed = self.metadata.get_all('Requires-Dist')
    needed = {re.match(r'[\w-]+', n)[0] for n in needed if 'extra' not in n}
    self.assertNoCommonElements(needed, {'safetensors', 'torch', 'pytest'})

  def test_the_script_is_the_program(self):
    points = self.zip.read(f'{self.info}/entry_points.txt').decode()
    self.assertIn('deepseek-jax = deepseek_jax.cli.main:run', points)


class DocumentsTest(absltest.TestCase):
  def test_all_name_one_version_and_one_licence(self):
    citation = (_ROOT / 'CITATION.cff').read_text()
    self.assertIn(f'\nversion: {ds.__version__}\n', citation)
    self.assertIn('\nlicense: Apache-2.0\n', citation)
    changes = (_ROOT / 'CHANGELOG.md').read_text()
    self.assertIn(f'\n## {ds.__version__}', changes)
    self.assertIn('(LICENSE)', (_ROOT / 'CONTRIBUTING.md').read_text())

  def test_docs_install_the_checkout_or_the_wheel_never_a_bare_name(self):
    texts = [*_ROOT.glob('*.md'), *(_ROOT / 'docs').rglob('*.md')]
    texts += [*(_ROOT / 'deepseek_jax').rglob('*.py')]
    for path in texts:
      self.assertNotRegex(path.read_text(), r'deepseek[_-]jax\[\w+\]', path)
      bare = re.findall(
        r'pip install [^`#\n]*\bdeepseek[_-]jax', path.read_text()
      )
      self.assertEqual(bare, [], path)

  def test_every_runtime_import_is_a_dependency(self):
    project = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']
    needed = ' '.join(project['dependencies'])
    for name in ('grain', 'chex', 'tokenizers', 'orbax-checkpoint', 'rich'):
      self.assertIn(name, needed)
    self.assertNotIn('safetensors', needed)


class ProgramTest(parameterized.TestCase):
  def test_every_forwarder_of_experiments_is_a_verb(self):
    forwarders = {p.stem for p in (_ROOT / 'experiments').glob('[a-z]*.py')}
    self.assertEqual(forwarders - {'common'} - set(program.verbs()), set())

  def test_every_verb_has_a_forwarder(self):
    there = {p.stem for p in (_ROOT / 'experiments').glob('[a-z]*.py')}
    self.assertEqual(set(program.verbs()) - there, set())

  def _run(self, *args):
    return subprocess.run(
      [sys.executable, '-m', 'deepseek_jax.cli.main', *args],
      cwd=_ROOT,
      capture_output=True,
      text=True,
    )

  def test_help_lists_every_verb(self):
    done = self._run('--help')
    self.assertEqual(done.returncode, 0)
    for verb, what in program.verbs().items():
      self.assertRegex(done.stdout, rf'(?m)^  {verb} +{re.escape(what)}$')

  def test_a_misspelt_verb_is_one_line(self):
    done = self._run('pretrian')
    self.assertEqual((done.returncode, done.stdout), (2, ''))
    self.assertLen(done.stderr.splitlines(), 1)
    self.assertIn(
      "'pretrian': no such verb; did you mean pretrain?", done.stderr
    )

  def test_a_verb_runs_with_its_flags(self):
    done = self._run('checkpoint', 'ls', '/nowhere')
    self.assertEqual(done.returncode, 2)
    self.assertEqual(
      done.stderr,
      'error: /nowhere: holds no checkpoint; name the folder of a run\n',
    )


class InterpretersTest(absltest.TestCase):
  def test_one_that_is_missing_is_one_line(self):
    done = subprocess.run(
      [sys.executable, str(_RUN), '3.99'], capture_output=True, text=True
    )
    self.assertEqual((done.returncode, done.stdout), (2, ''))
    self.assertLen(done.stderr.splitlines(), 1)
    self.assertIn('error: python 3.99: no such interpreter', done.stderr)

  def test_this_one_is_found(self):
    version = '{}.{}'.format(*sys.version_info[:2])
    self.assertIsNotNone(package.interpreter(version))


if __name__ == '__main__':
  absltest.main()
