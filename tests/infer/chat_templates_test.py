"""Every template that an installed package ships renders as in transformers."""

import csv
import importlib.metadata
import importlib.util
import pathlib

import pytest
from absl.testing import absltest

from tests.infer import chat_templates


def _shipped():
  spec = importlib.util.find_spec('trl')
  if spec is None:
    pytest.skip('trl is not installed')
  # Its files are read; the package itself is not imported.
  folder = pathlib.Path(spec.origin).parent / 'chat_templates'
  return sorted(folder.glob('*.jinja'))


def _rows():
  with open(chat_templates.LIST, encoding='utf-8', newline='') as file:
    return list(csv.DictReader(file, delimiter='\t'))


class ShippedTest(absltest.TestCase):
  def test_every_rendering_equals_transformers(self):
    files = _shipped()
    self.assertGreaterEqual(len(files), 60)
    compared = equal = 0
    for file in files:
      text = file.read_text(encoding='utf-8')
      found = chat_templates.compare(text)
      self.assertEqual(found.different, [], msg=file.name)
      self.assertGreater(found.equal, 0, msg=file.name)
      compared += found.compared
      equal += found.equal
    self.assertGreater(equal, 0.8 * compared)

  def test_the_list_names_what_was_compared(self):
    rows = _rows()
    self.assertGreaterEqual(len({row['sha256'] for row in rows}), 60)
    self.assertEqual({row['different'] for row in rows}, {'0'})
    source = f'PyPI trl {importlib.metadata.version("trl")}'
    listed = {r['name']: r['sha256'] for r in rows if r['source'] == source}
    if listed:  # another version has other templates
      shipped = {
        file.name: chat_templates.sha256(file.read_text(encoding='utf-8'))
        for file in _shipped()
      }
      self.assertEqual(listed, shipped)


if __name__ == '__main__':
  absltest.main()
