"""Notebooks: their form, and each from top to bottom with small parameters."""

import ast
import json
import re
import sys
import types
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

import deepseek_jax as ds
from deepseek_jax.record import shown

NOTEBOOKS = Path(__file__).parent.parent / 'notebooks'
# What each is called, and parameters of a few seconds.
SMALL = {
  '01_first_model': {'tokens': 8192, 'dim': 32},
  '02_routers': {
    'tokens': 2 * 8 * 128,
    'seeds': 2,
    'dim': 16,
    'layers': 2,
    'experts': 8,
  },
  '03_mla': {'length': 12, 'heads': 2},
  '04_dense_to_sparse': {
    **dict.fromkeys(('dense_tokens', 'warm_tokens', 'sparse_tokens'), 2 * 512),
    'v4_tokens': 512,
    'dim': 32,
    'length': 64,
    'top_k': 8,
  },
  '05_r1': {
    'sft_tokens': 2 * 8 * 31,
    'rounds': 2,
    'prompts': 2,
    'group': 4,
    'updates': 2,
    'dim': 16,
    'digits': 1,
  },
  '06_plan': {'devices': 64, 'dollars': 1.0},
  '07_hugging_face': {
    'text_tokens': 1024,
    'chat_tokens': 1024,
    'dim': 16,
    'facts': 3,
  },
  '08_own_idea': {'tokens': 2 * 8 * 128, 'seeds': 1, 'dim': 32},
}
DEFINE = {'08_own_idea'}  # whose lesson is to define
IMPORTED = {'deepseek_jax', 'jax', 'matplotlib', 'numpy'}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Decimals and percentages.
MEASURED = re.compile(r'\d\.\d|\d ?%')
# What has numbers in its name.
NAMES = re.compile(r'\]\([^)]*\)|`[^`]*`|arXiv:\S+|\bV\d\.\d|section \d\.\d')
names = pytest.mark.parametrize('name', SMALL)


def cells(name, kind='code'):
  """Returns the (source, tags) of a notebook's cells of a kind."""
  written = json.loads((NOTEBOOKS / f'{name}.ipynb').read_text())['cells']
  return [
    (''.join(cell['source']), cell['metadata'].get('tags', []))
    for cell in written
    if cell['cell_type'] == kind
  ]


def trees(name):
  return [(ast.parse(source), tags) for source, tags in cells(name)]


def definitions(tree):
  """Returns what a cell gives a name to that can be called."""
  return [
    node
    for node in ast.walk(tree)
    if isinstance(node, DEFINITIONS)
    or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda))
  ]


def test_these_are_the_notebooks_and_all_are_linked():
  assert sorted(path.stem for path in NOTEBOOKS.glob('*.ipynb')) == list(SMALL)
  assert [name[:2] for name in SMALL] == [f'{n:02}' for n in range(1, 9)]
  index = (NOTEBOOKS / 'README.md').read_text()
  for name in SMALL:
    first, _ = cells(name, 'markdown')[0]
    assert first.startswith(f'# {name[:2]} · '), name
    assert f'({name}.ipynb)' in index, name
  root = NOTEBOOKS.parent
  for page in ('README.md', 'docs/index.md', 'notebooks/README.md'):
    text = (root / page).read_text()
    assert 'notebooks' in text, page
  # Wherever a notebook points to another or to a page, it is there.
  for name in SMALL:
    for text, _ in cells(name, 'markdown'):
      for target in re.findall(r'\]\(([^)#]+)', text):
        if '://' not in target:
          assert (NOTEBOOKS / target).exists(), (name, target)


@names
def test_the_first_cell_installs_from_a_source(name):
  (source, tags), *rest = cells(name)
  assert tags == ['install']
  assert source == cells('01_first_model')[0][0], 'the same in all of them'
  named = [
    node.value.value
    for node in ast.parse(source).body
    if isinstance(node, ast.Assign) and node.targets[0].id == 'SOURCE'
  ]
  assert named == ['..'], 'no address is invented'
  assert not re.search(r'https?://|\.(com|org)\b', source)
  assert 'parameters' in rest[0][1]
  written = json.loads((NOTEBOOKS / f'{name}.ipynb').read_text())
  for cell in written['cells']:
    assert not cell.get('outputs'), 'outputs belong to whoever runs it'
    assert 'badge' not in ''.join(cell['source'])


def test_the_first_cell_keeps_the_jax_that_is_there(monkeypatch):
  source, _ = cells('01_first_model')[0]
  calls = []
  monkeypatch.setattr('subprocess.run', lambda *a, **k: calls.append((a, k)))
  exec(source, {})
  assert not calls, 'nothing is installed where the library is there'
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  exec(source, {})
  [((command,), how)] = calls
  assert command[:4] == [sys.executable, '-m', 'pip', 'install']
  assert '..' in command and how['check']
  import jax

  assert f'jax=={jax.__version__}' in command


@names
def test_imports_the_face_and_defines_nothing(name):
  allowed = IMPORTED | set(sys.stdlib_module_names)
  for tree, tags in trees(name):
    for node in ast.walk(tree):
      modules = []
      if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
        for alias in node.names:
          if alias.name == 'deepseek_jax':
            assert alias.asname == 'ds'
      elif isinstance(node, ast.ImportFrom):
        modules = [node.module]
        assert not node.module.startswith('deepseek_jax')
      assert {m.split('.')[0] for m in modules} <= allowed, modules
      assert 'deepseek_jax.' not in ' '.join(modules)
    found = definitions(tree)
    assert not found or (name in DEFINE and 'own' in tags), ast.dump(found[0])


@names
def test_pictures_are_told_and_numbers_are_computed(name):
  pictures = figures = 0
  for tree, _ in trees(name):
    for node in ast.walk(tree):
      if not isinstance(node, ast.Call):
        continue
      called = ast.unparse(node.func)
      assert called not in ('plt.show', 'plt.savefig'), 'without a text'
      figures += called in ('plt.subplots', 'plt.figure', 'ds.plan.plan_figure')
      if called == 'ds.show_picture':
        pictures += 1
        assert len(node.args) == 2, 'a picture and its text'
        inside = list(ast.walk(node.args[1]))
        told = any(isinstance(n, ast.FormattedValue) for n in inside)
        assert told, 'a text that tells what was computed'
  assert pictures == figures > 0
  for text, _ in cells(name, 'markdown'):
    assert '![' not in text and '<img' not in text
    found = MEASURED.findall(NAMES.sub('', text))
    assert set(found) <= {'5 %'}, 'numbers are what cells print'


def run(name, changes, monkeypatch):
  """Executes a notebook; returns the texts of its pictures."""
  module = types.ModuleType('__main__')
  # A class of a notebook belongs to __main__, as in a kernel.
  monkeypatch.setitem(sys.modules, '__main__', module)
  told = []

  def show(data, **how):
    told.append(how['metadata']['image/png']['alt'])
    assert data['text/plain'] == told[-1] and len(data['image/png']) > 1000
    return types.SimpleNamespace(update=show)

  monkeypatch.setattr(shown, '_display', lambda: show)
  _ = ds.build  # with flax, which looks for the real treescope
  tree = types.SimpleNamespace(display=print)
  monkeypatch.setitem(sys.modules, 'treescope', tree)
  for source, tags in cells(name):
    exec(compile(source, name, 'exec'), module.__dict__)
    if 'parameters' in tags:
      unknown = set(changes) - set(module.__dict__)
      assert not unknown, unknown
      module.__dict__.update(changes)
  pyplot.close('all')
  return told


@pytest.mark.slow  # compiles and trains several models
@names
def test_runs_from_top_to_bottom(name, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  matplotlib.use('Agg')
  texts = run(name, SMALL[name], monkeypatch)
  assert texts and all(len(text) > 40 for text in texts)
  assert not any('nan' in text for text in texts), texts
  assert ds.__version__ and capsys.readouterr().out
