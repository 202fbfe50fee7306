"""The documentation: links, names and commands hold, the generated page too."""

import pathlib
import re
import sys
import textwrap
import typing

from absl.testing import absltest

import deepseek_jax as ds

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'docs' / 'tools'))
import build_site  # noqa: E402
import config_fields  # noqa: E402
import pages  # noqa: E402

TEXTS = pages.pages()
_FACE = re.compile(r'\bds((?:\.[A-Za-z_]\w*)+)')
_FIELD = re.compile(
  r'`((?:model|data|train|evaluate|safety|mesh)(?:\.[a-z_]\w*)+)`'
)


def has_field(classes: list[type], names: list[str]) -> bool:
  """Returns whether one of the classes has the dotted field."""
  for cls in classes:
    hint = typing.get_type_hints(cls).get(names[0])
    if hint is None:
      continue
    # Keys of a dict are no fields: kinds, or axes of a mesh.
    if len(names) == 1 or typing.get_origin(hint) is dict:
      return True
    if has_field(config_fields.nested(hint), names[1:]):
      return True
  return False


class PagesTest(absltest.TestCase):
  def test_links_lead_to_pages_and_headings(self):
    self.assertEqual(pages.bad_links(TEXTS), [])

  def test_named_files_functions_and_tests_exist(self):
    self.assertEqual(pages.bad_names(TEXTS), [])

  def test_every_row_of_the_papers_names_code_and_a_test(self):
    rows = [
      line
      for line in TEXTS['papers.md'].splitlines()
      if line.startswith('| ') and '---' not in line
    ]
    rows = [row for row in rows if not row.startswith('| equation')]
    self.assertGreater(len(rows), 40)
    for row in rows:
      with self.subTest(row):
        _, code, test = (cell for cell in row.strip('|').split(' | '))
        self.assertRegex(code, r'`(deepseek_jax|pallas_kernels)/[^`]+::')
        self.assertNotEmpty(pages.tests_named(test))

  def test_names_of_the_face_exist(self):
    for page, text in TEXTS.items():
      for dotted in _FACE.findall(text):
        value = ds
        for name in dotted.strip('.').split('.'):
          self.assertTrue(hasattr(value, name), f'{page}: ds{dotted}')
          value = getattr(value, name)

  def test_named_fields_exist(self):
    for page, text in TEXTS.items():
      for dotted in _FIELD.findall(text):
        root, *names = dotted.split('.')
        known = has_field([ds.RunConfig], [root, *names])
        if root == 'model':  # a Model's functions look the same
          known |= has_field([ds.Model], names)
        self.assertTrue(known, f'{page}: {dotted}')

  def test_a_field_that_is_not_there_is_noticed(self):
    for dotted in ('model.moe.rooter', 'train.tokens.more', 'safety.model'):
      self.assertFalse(has_field([ds.RunConfig], dotted.split('.')), dotted)
    for dotted in ('model.attention.csa.stage', 'mesh.rules.vocab'):
      self.assertTrue(has_field([ds.RunConfig], dotted.split('.')), dotted)

  def test_commands_name_launchers(self):
    named = pages.commands(TEXTS)
    self.assertGreater(len(named), 10)
    for page, package, verb, _ in named:
      path = ROOT / package / f'{verb}.py'
      self.assertTrue(path.is_file(), f'{page}: {package}.{verb}')

  def test_python_blocks_are_python(self):
    for page, text in TEXTS.items():
      for block in pages.blocks(page, text):
        if block.language in ('python', 'py'):
          compile(block.text, f'{page}:{block.line}', 'exec')

  def test_every_page_is_in_the_contents(self):
    listed = set(
      re.findall(r'- ([\w-]+\.md)', (ROOT / 'mkdocs.yml').read_text())
    )
    self.assertEqual(listed, set(TEXTS))


class GeneratedTest(absltest.TestCase):
  def test_the_page_of_fields_is_up_to_date(self):
    self.assertEqual(
      config_fields.PAGE.read_text(),
      config_fields.page(),
      'run python docs/tools/config_fields.py',
    )

  def test_every_field_is_explained(self):
    self.assertEqual(config_fields.undocumented(), [])


class CheckerTest(absltest.TestCase):
  def test_a_broken_page_is_noticed(self):
    text = textwrap.dedent("""
      # Real heading
      [a](other.md) [b](#no-heading) [c](#real-heading) [d](https://x.org)
      `deepseek_jax/absent.py` `deepseek_jax/errors.py::Absent`
      `deepseek_jax/errors.py::InputError` `mine.py`
      ```sh
      python -m experiments.absent --x=1 \\
        --y
      ```
    """)
    broken = {'page.md': text}
    self.assertLen(pages.bad_links(broken), 2)
    self.assertLen(pages.bad_names(broken), 2)
    self.assertEqual(
      pages.commands(broken),
      [('page.md', 'experiments', 'absent', '--x=1    --y')],
    )

  def test_what_a_page_loads_from_elsewhere_is_noticed(self):
    page = '<a href="https://a.org">x</a><script src="js/b.js"></script>'
    self.assertEqual(build_site.loads_elsewhere(page), [])
    page += '<script async src="https://c.org/d.js"></script>'
    found = build_site.loads_elsewhere(page)
    self.assertEqual(found, ['https://c.org/d.js'])

  def test_a_missing_package_is_one_line_and_status_2(self):
    absent = lambda name: None if name == 'material' else name
    with absltest.mock.patch.object(
      build_site.importlib.util, 'find_spec', absent
    ):
      self.assertEqual(build_site.missing(), ['mkdocs-material'])
      self.assertEqual(build_site.main(), 2)


if __name__ == '__main__':
  absltest.main()
