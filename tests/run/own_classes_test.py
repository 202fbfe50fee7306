"""Runs with users' classes through the library: kept, read back, gone on."""

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import own_classes
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import agreement, folder, start
from tests.cli import own_window
from tests.faults import runs

_MODULE = own_window.__name__


def _digest(value: str):
  """The file of the classes, as if it had this hash."""
  return mock.patch.object(own_window, own_classes.DIGEST, value, create=True)


class OwnClassesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    holder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(holder.cleanup)
    cls.home = Path(holder.name)
    runs.write_corpus(cls.home / 'text')
    # As a notebook's: the class is __main__'s, which has no file there.
    main = type(sys)('__main__')
    main.Notebook = dataclasses.make_dataclass(
      'Notebook', [], bases=(own_window.WindowConfig,), frozen=True
    )
    main.Notebook.__module__ = '__main__'
    cls.main = main
    cls.config = ds.changed(
      own_window.get_config(),
      {
        'data.path': str(cls.home / 'text'),
        'model.compute.xla': (),  # no choice is left to the machine
      },
    )
    ds.fit(cls.config, cls.home / 'begun', console=False)

  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.dict(sys.modules, __main__=self.main))
    place = self.enterContext(tempfile.TemporaryDirectory())
    self.run_folder = Path(place) / 'run'
    shutil.copytree(self.home / 'begun', self.run_folder)

  def edit(self, change) -> None:
    path = self.run_folder / 'config.json'
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written))

  def notebook(self) -> ds.RunConfig:
    attention = self.main.Notebook(**vars(self.config.model.attention))
    return ds.changed(self.config, {'model.attention': attention})

  def test_comes_back_in_the_same_process(self):
    loaded = ds.load(self.run_folder)
    self.assertEqual((loaded.step, loaded.config), (2, self.config))

  def test_another_process_says_what_to_import(self):
    kind = f'{_MODULE}:WindowConfig'
    with mock.patch.dict(sys.modules):
      del sys.modules[_MODULE]
      words = f'{kind}.*own_window.py.*import {_MODULE} first'
      with self.assertRaisesRegex(ds.InputError, words):
        ds.load(self.run_folder)
      self.assertNotIn(_MODULE, sys.modules)

  def test_a_notebooks_class_has_no_file_and_comes_back(self):
    folder.renew(self.run_folder, self.notebook())
    written = json.loads((self.run_folder / 'config.json').read_text())
    self.assertEqual(
      written['code']['__main__'], {'file': None, 'sha256': None}
    )
    self.assertEqual(folder.config_of(self.run_folder), self.notebook())
    del self.main.Notebook
    with self.assertRaisesRegex(ds.InputError, 'notebook .*define it there'):
      folder.config_of(self.run_folder)

  def test_a_file_that_changed_is_named_with_both_hashes(self):
    (there,) = folder.code_of(self.config)['code'].values()
    words = f'own_window.py is another file.*{there["sha256"]} there, beef here'
    with _digest('beef'):
      for use in (
        lambda: ds.load(self.run_folder),
        lambda: folder.claim(self.run_folder, self.config),
        lambda: ds.fit(self.config, self.run_folder, console=False),
      ):
        with self.assertRaisesRegex(ds.InputError, words):
          use()

  def test_weights_may_come_from_a_run_of_the_file_before(self):
    with _digest('beef'):
      tokenizer = ds.load(self.run_folder, same_code=False).tokenizer
      source = ds.changed(self.config, {'init_from': str(self.run_folder)})
      start.check_source(source, ds.build(source.model), tokenizer)

  def test_a_folder_from_before_the_hash_loads_and_goes_on(self):
    self.edit(lambda written: written.pop('code'))
    self.assertEqual(folder.config_of(self.run_folder), self.config)
    self.assertEmpty(folder._changes(self.run_folder, self.config))

  @parameterized.parameters(
    (3,), ('x',), ([],), (None,), ({'x': 3},), ({_MODULE: None},)
  )
  def test_a_damaged_entry_is_no_crash(self, code):
    self.edit(lambda written: written.update(code=code))
    self.assertEqual(folder.config_of(self.run_folder), self.config)

  def test_a_run_without_users_classes_keeps_no_code(self):
    self.assertEqual(folder.code_of(runs.config(self.home)), {})

  def test_another_run_is_refused_as_another_run(self):
    other = ds.changed(self.config, {'model.attention.window': 3})
    words = 'holds another run .*model.attention.window: 4 there, 3 here'
    with self.assertRaisesRegex(ds.InputError, words):
      folder.claim(self.run_folder, other)

  def test_processes_compare_the_file(self):
    sent = []
    keep = lambda text: sent.append(text) or text
    with mock.patch.object(distributed, 'text_from_first', keep):
      agreement.check_config(self.config)
    first = mock.patch.object(distributed, 'text_from_first', lambda _: sent[0])
    index = mock.patch.object(jax, 'process_index', return_value=3)
    refused = self.assertRaisesRegex(ds.InputError, 'sha256: .*"beef" in proc')
    with _digest('beef'), first, index, refused:
      agreement.check_config(self.config)


if __name__ == '__main__':
  absltest.main()
