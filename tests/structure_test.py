"""The shape of the code: who imports whom, and how much of Flax is used."""

import ast
import collections
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Lower may not import higher; a name stands for all below it that is not named.
RANK = {
  'pallas_kernels': 0,
  'deepseek_jax.version': 0.5,
  'deepseek_jax.errors': 1,
  'deepseek_jax.own_classes': 1.5,
  'deepseek_jax.config': 2,
  'deepseek_jax.config_changes': 2.5,
  'deepseek_jax.fields': 2.5,
  'deepseek_jax.console': 2,
  'deepseek_jax.say': 2,
  'deepseek_jax.trees': 2,
  'deepseek_jax.files': 2,
  'deepseek_jax.parallel': 3,
  'deepseek_jax.data': 3,
  'deepseek_jax.record': 3,
  'deepseek_jax.model': 4,
  'deepseek_jax.presets': 5,
  'deepseek_jax.train': 5,
  'deepseek_jax.infer': 5,
  'deepseek_jax.pipeline': 6,
  'deepseek_jax.hf': 6,
  'deepseek_jax.rl': 6,
  'deepseek_jax.plan': 7,
  'deepseek_jax.run': 7,
  'deepseek_jax.evaluation': 8,
  'deepseek_jax.serve': 8,
  'deepseek_jax.ladder': 8,
  'deepseek_jax.recipes': 8,
  'deepseek_jax.posttrain': 8.5,
  'deepseek_jax': 9,  # the face
  'deepseek_jax.cli': 10,
  'experiments': 11,
  'notebooks': 11,
  'benchmarks': 11,
  'tests': 12,
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
# Names that several files or classes share, and why no reader confuses them.
SHARED_FILES = {
  '__init__': 'of a package',
  'config': 'the configurations of its own package, or the trees themselves',
  # Every kernel is a folder of these files, named by the kernel.
  'gpu': "a kernel's code for GPUs",
  'tpu': "a kernel's code for TPUs",
  'reference': 'what a kernel is checked against',
  'shapes': 'what a kernel is tested and timed with',
  'fp8': "a kernel's FP8 variant, and hf's FP8 weights",
  # Models have families: checkpoints in hf/families, prompts in infer/formats.
  'v3': 'of DeepSeek-V3',
  'v32': 'of DeepSeek-V3.2',
  'v4': 'of DeepSeek-V4',
}
SHARED_CLASSES = {
  'Shape': "each kernel's shapes.py describes its own",
  # Inference has words of its own, which no module imports beside the others.
  'Chunk': 'of a prompt in infer, of a stage in pipeline',
  'Delta': 'of text in detokenize, of a message in formats',
  'Format': 'of prompts in infer, of stored weights in hf',
  'Leaf': 'of a cache in infer, of a checkpoint in hf',
  'Pages': 'of a pool in infer, the kernel argument in latent_kv',
  'Parsed': 'an answer in infer, a config.json in hf',
  'Sequence': 'a request under way in infer, keys of a shard in parallel',
  'Store': 'of cache pages in infer, of converted weights in hf',
}
LINES = 450  # most lines of a file
LONG_FILES = {
  'deepseek_jax/hf/families/v4.py': 'all of one family, as every family is',
}


def sources(*packages):
  for package in packages:
    for path in sorted((ROOT / package).rglob('*.py')):
      yield path, ast.parse(path.read_text(), str(path))


def imports(tree):
  """Returns (module, line) of every import, those inside functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      for alias in node.names:
        inside = f'{module}.{alias.name}'
        yield (inside if inside in RANK else module), node.lineno


def room(module):
  """Returns the entry of RANK that a dotted module name belongs to."""
  while module not in RANK and '.' in module:
    module = module.rpartition('.')[0]
  return module


def backward(tree, package):
  """Returns the imports that point from a room to one as high or higher."""
  return [
    (module, line)
    for module, line in imports(tree)
    if module.startswith('.')
    or (
      room(module) != package
      and RANK.get(room(module), -1) >= RANK[package]
      and not RANK[package] == RANK['experiments'] == RANK[room(module)]
    )
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
    wrong = {}
    for path, tree in sources(package):
      relative = path.relative_to(ROOT).with_suffix('')
      dotted = '.'.join(relative.parts).removesuffix('.__init__')
      if found := backward(tree, room(dotted)):
        wrong[str(relative)] = found
    self.assertEqual(wrong, {})

  def test_every_package_and_module_of_the_library_has_a_rank(self):
    rooms = {
      p.stem
      for p in (ROOT / 'deepseek_jax').glob('[a-z]*')
      if p.is_dir() or p.suffix == '.py'
    }
    missing = {f'deepseek_jax.{name}' for name in rooms} - set(RANK)
    self.assertEqual(missing, set())

  @parameterized.parameters(
    ('pallas_kernels', 'import deepseek_jax'),
    ('pallas_kernels', 'def f():\n  from deepseek_jax.model import norm'),
    ('deepseek_jax', 'from deepseek_jax.cli import common'),
    ('deepseek_jax', 'import jax, tests.tiny'),
    ('experiments', 'from .common import run'),
    ('deepseek_jax.parallel', 'from deepseek_jax.model.experts import moe'),
    ('deepseek_jax.parallel', 'from deepseek_jax import model'),
    ('deepseek_jax.model', 'from deepseek_jax.train import step'),
    ('deepseek_jax.train', 'from deepseek_jax.infer.sampling import generate'),
    ('deepseek_jax.train', 'from deepseek_jax.pipeline import stages'),
    ('deepseek_jax.infer', 'import deepseek_jax.hf.loading'),
    ('deepseek_jax.pipeline', 'from deepseek_jax.plan import memory'),
    ('deepseek_jax.plan', 'from deepseek_jax.run.config import RunConfig'),
    ('deepseek_jax.run', 'import deepseek_jax as ds'),
    ('deepseek_jax', 'from deepseek_jax.cli import pretrain'),
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


def repeated_files(paths):
  """Returns {stem: paths} of the names that several modules share.

  A launcher is named by its verb: deepseek_jax/cli may share names with others.
  """
  found = collections.defaultdict(list)
  for path in paths:
    if path.parent != ROOT / 'deepseek_jax' / 'cli':
      found[path.stem].append(str(path))
  return {
    stem: where
    for stem, where in found.items()
    if len(where) > 1 and stem not in SHARED_FILES
  }


def repeated_classes(trees):
  """Returns {name: paths} of the public classes that occur more than once."""
  found = collections.defaultdict(list)
  for path, tree in trees:
    for node in ast.walk(tree):
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        found[node.name].append(str(path))
  return {
    name: where
    for name, where in found.items()
    if len(where) > 1 and name not in SHARED_CLASSES
  }


class NamesTest(absltest.TestCase):
  PACKAGES = ('deepseek_jax', 'pallas_kernels')

  def test_no_two_modules_share_a_file_name(self):
    paths = [path for path, _ in sources(*self.PACKAGES)]
    self.assertEqual(repeated_files(paths), {})

  def test_no_two_public_classes_share_a_name(self):
    self.assertEqual(repeated_classes(sources(*self.PACKAGES)), {})

  def test_files_are_short(self):
    packages = (*self.PACKAGES, 'experiments', 'benchmarks')
    lengths = {
      str(path.relative_to(ROOT)): len(path.read_text().splitlines())
      for path, _ in sources(*packages)
    }
    long = {path: n for path, n in lengths.items() if n > LINES}
    self.assertEqual(set(long) - set(LONG_FILES), set(), long)

  def test_a_name_that_occurs_twice_is_found(self):
    room = ROOT / 'deepseek_jax'
    paths = [room / 'plan/tables.py', room / 'data/tables.py']
    self.assertEqual(list(repeated_files(paths)), ['tables'])
    launchers = [room / 'hf/verify.py', room / 'cli/verify.py']
    self.assertEqual(repeated_files(launchers), {})
    configs = [room / 'train/config.py', room / 'run/config.py']
    self.assertEqual(repeated_files(configs), {})
    tree = ast.parse('class Part: pass\nclass _Own: pass')
    inner = ast.parse('def f():\n  class Part: pass\n  class _Own: pass')
    found = repeated_classes([('a.py', tree), ('b.py', inner)])
    self.assertEqual(found, {'Part': ['a.py', 'b.py']})


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


class MarksTest(absltest.TestCase):
  def test_they_stand_below_parameters(self):
    # Above, they mark the list of cases and none of them.
    wrong = '@pytest.mark.slow\n  @parameterized.'
    found = [
      str(path.relative_to(ROOT))
      for path in sorted((ROOT / 'tests').rglob('*_test.py'))
      if path.name != 'structure_test.py' and wrong in path.read_text()
    ]
    self.assertEqual(found, [])


if __name__ == '__main__':
  absltest.main()
