"""Every notebook runs from top to bottom, with parameters of a few seconds."""

import json
from pathlib import Path
from unittest import mock

import matplotlib
import pytest

NOTEBOOKS = Path(__file__).parent.parent / 'notebooks'
SMALL = {'ablation': {'tokens': 2 * 8 * 128, 'dim': 16, 'layers': 2}}


@pytest.mark.slow  # compiles each arm of an ablation
@pytest.mark.parametrize(
  'name', sorted(p.stem for p in NOTEBOOKS.glob('*.ipynb'))
)
def test_runs_and_defines_nothing(name, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  matplotlib.use('Agg')
  cells = json.loads((NOTEBOOKS / f'{name}.ipynb').read_text())['cells']
  names = {'__name__': name}
  with mock.patch('matplotlib.pyplot.show') as shown:
    for cell in cells:
      if cell['cell_type'] != 'code':
        continue
      assert not cell['outputs'], 'outputs belong to whoever runs it'
      source = ''.join(cell['source'])
      assert (
        'def ' not in source.replace("'def ", '') and 'class ' not in source
      )
      exec(compile(source, name, 'exec'), names)
      if 'parameters' in cell['metadata'].get('tags', ()):
        names.update(SMALL[name])
  matplotlib.pyplot.close('all')
  assert shown.called
  assert 'parameters' in capsys.readouterr().out
