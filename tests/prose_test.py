"""The code's prose: docstrings that open with verbs, types, short functions."""

import ast
import pathlib
from typing import NamedTuple

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPENERS = ('Of', 'As', 'But', 'What', 'Which', 'For', 'From', 'By')
# Words in s that are no verbs; nouns like Rows mostly go on with "of".
NO_VERBS = ('Always', 'Axis', 'Bias', 'Its', 'Keys', 'Plus', 'This', 'Thus')
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Limits(NamedTuple):
  """Sets the shares that a package keeps and the length of its functions.

  Attributes:
    documented: least share of functions and classes at the top of a module or
      class that have a docstring.
    verbs: least share of docstrings that open with a verb.
    annotated: least share of functions whose arguments all have a type.
    lines: most lines of a function.
  """

  documented: float
  verbs: float
  annotated: float
  lines: int


PACKAGES = {
  'deepseek_jax': Limits(0.95, 0.95, 0.95, 80),
  'pallas_kernels': Limits(0.95, 0.95, 0.95, 100),
}


def definitions(tree: ast.AST):
  """Yields (function or class, whether a module or class holds it)."""
  holders = [
    n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef)
  ]
  outer = {id(node) for holder in holders for node in holder.body}
  for node in ast.walk(tree):
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
      yield node, id(node) in outer


def opens_with_verb(docstring: str) -> bool:
  """Returns whether the first word looks like 'Returns' or 'Raises'."""
  word, *rest = docstring.split(maxsplit=2)
  return (
    word.isalpha()
    and word.istitle()
    and word.endswith('s')
    and not word.endswith('ss')
    and word not in NO_VERBS
    and rest[:1] != ['of']
  )


def is_annotated(function: ast.FunctionDef) -> bool:
  """Returns whether every argument but self, cls and _ has a type."""
  given = function.args
  args = [*given.posonlyargs, *given.args, *given.kwonlyargs]
  args += [arg for arg in (given.vararg, given.kwarg) if arg]
  untyped = [arg.arg for arg in args if arg.annotation is None]
  return set(untyped) <= {'self', 'cls', '_'}


def lines_of(function: ast.FunctionDef) -> int:
  """Returns the lines of a function, those inside it included."""
  return function.end_lineno - function.lineno + 1


def found(trees: dict[str, ast.AST], limits: Limits) -> list[str]:
  """Returns a line for every limit that the modules of a package exceed."""
  nodes = [(m, n, top) for m, t in trees.items() for n, top in definitions(t)]
  docs = [(m, n, ast.get_docstring(n)) for m, n, _ in nodes]
  functions = [(m, n) for m, n, _ in nodes if isinstance(n, FUNCTIONS)]
  name = lambda module, node: f'{module}:{node.lineno} {node.name}'
  heads = [(m, ast.get_docstring(tree)) for m, tree in trees.items()]
  heads += [(name(m, n), text) for m, n, text in docs]
  wrong = [
    f'{where}: opens with {text.split()[0]}'
    for where, text in heads
    if text and text.split()[0] in OPENERS
  ] + [
    f'{name(m, n)}: {lines_of(n)} lines, not {limits.lines}'
    for m, n in functions
    if lines_of(n) > limits.lines
  ]
  lacks = {
    'documented': [
      (name(m, n), ast.get_docstring(n) is not None)
      for m, n, top in nodes
      if top
    ],
    'verbs': [
      (name(m, n), opens_with_verb(text)) for m, n, text in docs if text
    ],
    'annotated': [(name(m, n), is_annotated(n)) for m, n in functions],
  }
  for kind, held in lacks.items():
    share = sum(ok for _, ok in held) / len(held) if held else 1.0
    if share < getattr(limits, kind):
      some = ', '.join([where for where, ok in held if not ok][:9])
      wrong.append(f'{kind}: {share:.3f} < {getattr(limits, kind)}: {some} ...')
  return wrong


class ProseTest(parameterized.TestCase):
  @parameterized.parameters([(package,) for package in PACKAGES])
  def test_a_package_keeps_its_limits(self, package):
    paths = sorted((ROOT / package).rglob('*.py'))
    self.assertNotEmpty(paths)
    trees = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in paths}
    self.assertEqual(found(trees, PACKAGES[package]), [])

  @parameterized.parameters(
    ('def f():\n  """Of a row: its sum."""', 'opens with Of'),
    ('"""What the rows share."""', 'm: opens with What'),
    ('def f():\n  """The sum of a row."""', 'verbs: 0.000'),
    ('def f():\n  """This is a sum."""', 'verbs: 0.000'),
    ('class A:\n  """Class of sums."""', 'verbs: 0.000'),
    ('class A:\n  """Rows of sums."""', 'verbs: 0.000'),
    ('def f():\n  pass', 'documented: 0.000'),
    ('def f(x, *, y: int):\n  """Returns x."""', 'annotated: 0.000'),
    ('def f(*args):\n  """Returns args."""', 'annotated: 0.000'),
    ('def f():\n  """Returns 1."""\n\n\n\n  return 1', '6 lines, not 5'),
  )
  def test_a_fault_is_found(self, source, message):
    wrong = found({'m': ast.parse(source)}, Limits(1.0, 1.0, 1.0, 5))
    self.assertIn(message, '\n'.join(wrong))

  def test_good_code_has_no_fault(self):
    source = (
      'class A:\n  """Holds x."""\n  def f(self, x: int, _):\n'
      '    """Returns x, doubled."""\n    def inner(): pass'
    )
    limits = Limits(1.0, 1.0, 1.0, 5)
    trees = {'m': ast.parse(source), 'empty': ast.parse('')}
    self.assertEqual(found(trees, limits), [])
    self.assertEqual(found({'empty': ast.parse('')}, limits), [])


if __name__ == '__main__':
  absltest.main()
