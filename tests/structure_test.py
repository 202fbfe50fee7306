"""The shape of the code: who imports whom, and how much of Flax is used."""

import ast
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Lower may not import higher.
RANK = {
  'pallas_kernels': 0,
  'deepseek_jax': 1,
  'experiments': 2,
  'notebooks': 2,
  'benchmarks': 2,
  'tests': 3,
}
NNX = {
  'Module',
  'Param',
  'Variable',
  'Rngs',
  'List',
  'initializers',
  'split',
  'merge',
  'state',
  'to_pure_dict',
}


def sources(*packages):
  for package in packages:
    for path in sorted((ROOT / package).rglob('*.py')):
      yield path, ast.parse(path.read_text(), str(path))


def imports(tree):
  """(module, line) of every import, those inside functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield ('.' * node.level + (node.module or ''), node.lineno)


def backward(tree, package):
  """Imports that point from `package` to a higher one."""
  return [
    (module, line)
    for module, line in imports(tree)
    if RANK.get(module.split('.')[0], -1) > RANK[package]
    or module.startswith('.')
  ]


def annotations(tree):
  """Every node inside a type annotation."""
  for node in ast.walk(tree):
    found = [getattr(node, 'annotation', None), getattr(node, 'returns', None)]
    for top in filter(None, found):
      yield from ast.walk(top)


def flax_misuse(tree):
  """(what, line) of each use of Flax outside the allowed subset."""
  types = set(map(id, annotations(tree)))
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or '') == 'flax':
      extra = [a.name for a in node.names if a.name != 'nnx' or a.asname]
      yield from ((name, node.lineno) for name in extra)
    elif isinstance(node, ast.ImportFrom | ast.Import):
      modules = [module for module, _ in imports(ast.Module([node], []))]
      yield from (
        (m, node.lineno) for m in modules if m.split('.')[0] == 'flax'
      )
    elif (
      isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and node.value.id == 'nnx'
    ):
      allowed = NNX | ({'State'} if id(node) in types else set())
      if node.attr not in allowed:
        yield (f'nnx.{node.attr}', node.lineno)
    elif isinstance(node, ast.Assign | ast.AugAssign):
      targets = getattr(node, 'targets', None) or [node.target]
      for target in targets:
        if (
          isinstance(target, ast.Subscript)
          and isinstance(target.slice, ast.Constant)
          and target.slice.value is ...
        ):
          yield ('v[...] = ', node.lineno)


class ImportsTest(parameterized.TestCase):
  @parameterized.parameters(
    'pallas_kernels', 'deepseek_jax', 'experiments', 'benchmarks', 'notebooks'
  )
  def test_imports_run_one_way(self, package):
    if package != 'notebooks':
      self.assertNotEmpty(list(sources(package)))
    wrong = {
      str(path.relative_to(ROOT)): found
      for path, tree in sources(package)
      if (found := backward(tree, package))
    }
    self.assertEqual(wrong, {})

  @parameterized.parameters(
    ('pallas_kernels', 'import deepseek_jax'),
    ('pallas_kernels', 'def f():\n  from deepseek_jax.layers import mla'),
    ('deepseek_jax', 'from experiments import common'),
    ('deepseek_jax', 'import jax, tests.tiny'),
    ('experiments', 'from .common import run'),
  )
  def test_a_wrong_import_is_seen(self, package, code):
    self.assertNotEmpty(backward(ast.parse(code), package))

  def test_importing_the_library_stays_light(self):
    heavy = ('torch', 'transformers', 'tokenizers', 'pyarrow', 'matplotlib')
    heavy += ('grain', 'orbax', 'tensorboardX')
    code = (
      'import sys, deepseek_jax;'
      f'print([m for m in {heavy} if m in sys.modules])'
    )
    done = subprocess.run(
      [sys.executable, '-c', code],
      capture_output=True,
      text=True,
      cwd=ROOT,
      check=True,
    )
    self.assertEqual(done.stdout.strip(), '[]')


class FlaxTest(parameterized.TestCase):
  def test_only_the_allowed_subset_is_used(self):
    wrong = {
      str(path.relative_to(ROOT)): found
      for path, tree in sources('deepseek_jax', 'experiments', 'benchmarks')
      if (found := list(flax_misuse(tree)))
    }
    self.assertEqual(wrong, {})

  def test_kernels_know_no_flax(self):
    for path, tree in sources('pallas_kernels'):
      used = [m for m, _ in imports(tree) if m.split('.')[0] == 'flax']
      self.assertEqual(used, [], path)

  @parameterized.parameters(
    'y = nnx.jit(f)',
    'nnx.vmap(f)(x)',
    'self.sow(nnx.Intermediate, x)',
    'import flax.linen as nn',
    'from flax import linen',
    'from flax.nnx import Module',
    'import flax',
    'from flax import nnx as n',
    'v[...] = 3',
    'self.bias[...] += 1',
    'x = nnx.State({})',
  )
  def test_a_misuse_is_seen(self, code):
    self.assertNotEmpty(list(flax_misuse(ast.parse(code))))

  @parameterized.parameters(
    'from flax import nnx', 'def f(s: nnx.State): ...', 'x = v[...]'
  )
  def test_what_is_allowed_passes(self, code):
    self.assertEmpty(list(flax_misuse(ast.parse(code))))


if __name__ == '__main__':
  absltest.main()
