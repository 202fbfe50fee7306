"""The face: everything that configurations, notebooks and README use."""

import ast
import json
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest, parameterized

import deepseek_jax as ds

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = (
  'v3_tiny',
  'v32_tiny',
  'v32_warmup',
  'v32_sparse',
  'v4_tiny',
  'nsa_tiny',
  'engram_tiny',
  'sft_tiny',
  'grpo_tiny',
  'distill_tiny',
)


def _notebook_code(path):
  cells = json.loads(path.read_text())['cells']
  return '\n'.join(
    ''.join(c['source']) for c in cells if c['cell_type'] == 'code'
  )


def _reached(code):
  """Returns the dotted names below `ds` that code reads."""
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Attribute):
      parts = []
      while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
      if isinstance(node, ast.Name) and node.id == 'ds':
        yield parts[::-1]


def _users():
  for path in sorted((ROOT / 'experiments' / 'configs').glob('*.py')):
    yield path, path.read_text()
  for path in sorted((ROOT / 'notebooks').glob('*.ipynb')):
    yield path, _notebook_code(path)
  for number, block in enumerate(
    re.findall(r'(?:^    .*\n|^\n)+', (ROOT / 'README.md').read_text(), re.M)
  ):
    if 'ds.' in block:
      names = sorted(set(re.findall(r'\bds(?:\.[A-Za-z_]\w*)+', block)))
      yield ROOT / f'README.md block {number}', '\n'.join(names)


class FaceTest(parameterized.TestCase):
  def test_what_the_stub_names_is_there(self):
    stub = ast.parse((ROOT / 'deepseek_jax' / '__init__.pyi').read_text())
    (named,) = [
      ast.literal_eval(node.value)
      for node in stub.body
      if isinstance(node, ast.Assign)
    ]
    self.assertEqual(ds.__all__, sorted(named))
    self.assertContainsSubset(named, dir(ds))
    for name in named:
      self.assertIsNotNone(getattr(ds, name), name)
    self.assertContainsSubset(ds.__all__, vars(ds))  # looked up once
    with self.assertRaisesRegex(AttributeError, "no attribute 'bulid'"):
      _ = ds.bulid

  def test_a_module_may_be_the_first_name_that_is_read(self):
    stub = ast.parse((ROOT / 'deepseek_jax' / '__init__.pyi').read_text())
    found = [
      alias.name
      for node in stub.body
      if isinstance(node, ast.ImportFrom)
      for alias in node.names
      if (ROOT / node.module.replace('.', '/') / f'{alias.name}.py').exists()
    ]
    self.assertIn('grpo', found)
    for name in found:
      code = f'import deepseek_jax as ds; print(ds.{name}.__name__)'
      done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
      )
      self.assertEndsWith(done.stdout.strip(), f'.{name}', done.stderr)

  @parameterized.parameters(
    ('deepseek_jax', ('jax', 'numpy')),
    ('deepseek_jax.config', ('jax',)),
    (
      'deepseek_jax.model.attention.mla',
      ('deepseek_jax.run', 'deepseek_jax.train'),
    ),
    ('deepseek_jax.data.packing', ('deepseek_jax.model',)),
    ('pallas_kernels.indexer', ('deepseek_jax', 'flax')),
  )
  def test_one_module_imports_what_it_needs(self, module, others):
    seen = f'[o for o in {others} if o in sys.modules]'
    code = f'import sys, {module}; print({seen})'
    done = subprocess.run(
      [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
    )
    self.assertEqual(done.stdout.strip(), '[]', done.stderr)

  def test_what_users_read_exists(self):
    seen = 0
    for path, code in _users():
      for parts in _reached(code):
        there = ds
        for part in parts[:2]:
          self.assertTrue(hasattr(there, part), f'{path}: ds.{parts}')
          there = getattr(there, part)
          seen += 1
          if not hasattr(there, '__path__') and not hasattr(there, '__spec__'):
            break
    self.assertGreater(seen, 30)

  def test_configs_and_notebooks_use_only_the_face(self):
    for path, code in _users():
      if 'README' in path.name:
        continue
      inner = re.findall(r'(?:from|import) (deepseek_jax[.]\S+)', code)
      inner += re.findall(r'from deepseek_jax import', code)
      if path.name != 'preset.py':
        self.assertEqual(inner, [], path)

  @parameterized.parameters(*RECIPES)
  def test_a_config_file_returns_the_recipe_of_its_name(self, name):
    module = __import__(f'experiments.configs.{name}', fromlist=['get_config'])
    made = module.get_config()
    self.assertEqual(made, getattr(ds.recipes, name)())

  def test_every_recipe_has_a_config_file(self):
    files = {p.stem for p in (ROOT / 'experiments' / 'configs').glob('*.py')}
    public = {
      name
      for name, value in vars(ds.recipes).items()
      if callable(value)
      and getattr(value, '__module__', '') == ds.recipes.__name__
      and not name.startswith('_')
    }
    self.assertEqual(public, set(RECIPES))
    self.assertLessEqual(public, files)


if __name__ == '__main__':
  absltest.main()
