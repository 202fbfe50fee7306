"""The launchers as a user meets them: real processes, flags and exit codes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

_ROOT = Path(__file__).parents[2]
_TINY = [
  '--config=experiments/configs/v3_tiny.py',
  '--config.model.vocab_size=261',
  '--config.model.dim=32',
  "--config.model.layout=((('dense', 'moe'), 1),)",
  '--config.model.ffn.width=32',
  '--config.model.moe.width=16',
  '--config.data.tokenizer=bytes',
  '--config.data.vocab_size=261',
  '--config.data.seq_len=64',
  '--config.data.heldout_fraction=0.3',
  '--config.train.tokens=768',
  '--config.train.batch.size=4',
  '--config.evaluate.every=0',
]


def _start(folder: Path, verb: str, *args: str) -> subprocess.Popen:
  env = os.environ | {'XDG_CACHE_HOME': str(folder / 'cache')}
  return subprocess.Popen(
    [sys.executable, '-m', f'experiments.{verb}', *args],
    cwd=_ROOT,
    env=env | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _corpus(folder: Path) -> Path:
  folder.mkdir()
  for i in range(10):
    body = ''.join(f'def f{j}(x):\n  return x + {i}\n\n' for j in range(30))
    (folder / f'm{i}.py').write_text(body)
  return folder


class HelpTest(absltest.TestCase):
  def test_help_shows_the_configuration_and_the_processes(self):
    with tempfile.TemporaryDirectory() as folder:
      out, _ = _start(Path(folder), 'pretrain', '--help').communicate(60)
    for flag in ('--config:', '--workdir:', '--coordinator:'):
      self.assertIn(flag, out)


# name -> (flags, what the one line must say)
_MISTAKES = {
  'unknown_field': (
    ['--config.model.moe.topk=2'],
    ['--config.model.moe.topk: no field', 'did you mean', 'moe.top_k?'],
  ),
  'ill_typed': (['--config.model.dim=wide'], ['dim', 'wide']),
  'bad_choice': (
    ['--config.model.moe.router.scoring=relu'],
    ['model.moe.router.scoring', 'relu', 'sigmoid'],
  ),
  'top_k_over_experts': (
    ['--config.model.moe.top_k=40'],
    ['top_k = 40', '16'],
  ),
  'groups_do_not_divide': (
    ['--config.model.moe.router.groups=5'],
    ['router.groups = 5', 'experts = 16'],
  ),
  'missing_path': (['--config.data.path=/nowhere/at/all'], ['/nowhere/at/all']),
  'empty_corpus': (['--config.data.path={empty}'], ['empty']),
  'no_folder_but_a_fifo': (['--config.data.path={fifo}'], ['no regular file']),
  'most_left_out': (
    ['--config.data.path={page}'],
    ['more text is left out than read', 'page.html'],
  ),
  'deep_tokenizer': (
    ['--config.data.path={corpus}', '--config.data.tokenizer={deep}'],
    ['data.tokenizer', 'nested too deeply'],
  ),
  'not_utf8': (['--config.data.path={latin}'], ['latin', 'UTF-8']),
  'vocabulary_too_small': (
    [
      '--config.data.path={corpus}',
      '--config.data.tokenizer=bpe',
      '--config.data.vocab_size=40',
    ],
    ['vocab_size', '40'],
  ),
  'data_vocabulary_over_model': (
    ['--config.data.vocab_size=300'],
    ['data.vocab_size = 300', 'model.vocab_size = 261'],
  ),
  'inside_none': (
    ['--config.model.moe.capacity.factor=1.5'],
    ['config.model.moe.capacity is None', '="{\'factor\': 1.5}"'],
  ),
  'ill_typed_optional': (
    ['--config.model.attention.q_rank=wide'],
    ["model.attention.q_rank = 'wide': is str, must be int or NoneType"],
  ),
  'value_apart': (['--config.model.dim', '8', '9'], ["['9']", 'follow a =']),
  'unknown_flag': (['--steps=3'], ['steps']),
  'no_such_config': (['--config=nothing.py'], ['nothing.py']),
}
_CHANGED = """import deepseek_jax as ds
from experiments.common import editable
def get_config():
  config = editable(ds.recipes.v3_tiny())
  config.model.{}
  return config
"""
# name -> (what the config file holds; None: there is none, words of the line)
_CONFIG_FILES = {
  'absent': (None, ['absent.py']),
  'syntax': ('def get_config(:\n', ['SyntaxError', 'syntax.py, line 1']),
  'raises': ('def get_config():\n  return 1 / 0\n', ['ZeroDivision', 'line 2']),
  'no_function': ('X = 1\n', ['no_function.py: has no function get_config()']),
  'ill_valued': ("raise ValueError('peak = 7')\n", ['peak = 7']),
  'other': ('def get_config():\n  return 3\n', ['get_config()', 'int']),
  'misspelt': (
    _CHANGED.format("moe.router.scorin = 'softmax'"),
    ['no field scorin; did you mean scoring? (', 'misspelt.py, line 5)'],
  ),
  'unknown': (
    _CHANGED.format('moe.router.zzzz = 1'),
    ['Key "zzzz" does not exist (', 'unknown.py, line 5)'],
  ),
}


class MistakesTest(parameterized.TestCase):
  """Every mistake: exit code 2, one line that names it, nothing written."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    places = {'corpus': _corpus(cls.folder / 'corpus')}
    for name in ('empty', 'latin'):
      places[name] = cls.folder / name
      places[name].mkdir()
    (cls.folder / 'page').mkdir()
    (cls.folder / 'page' / 'page.html').write_text('<p>words</p>' * 99)
    (cls.folder / 'page' / 'notes.txt').write_text('words')
    (cls.folder / 'deep.json').write_text('[' * 99_999)
    os.mkfifo(cls.folder / 'fifo.txt')
    places |= {
      'page': cls.folder / 'page',
      'deep': cls.folder / 'deep.json',
      'fifo': cls.folder / 'fifo.txt',
    }
    (places['latin'] / 'old.txt').write_bytes('Grüße'.encode('latin-1') * 20)
    cls.runs = {}
    for name, (flags, _) in _MISTAKES.items():
      workdir = f'--workdir={cls.folder / "runs" / name}'
      flags = [f.format(**places) for f in flags]
      cls.runs[name] = _start(cls.folder, 'pretrain', *_TINY, *flags, workdir)

  @parameterized.parameters(*_MISTAKES)
  def test_is_one_clear_line_and_status_2(self, name):
    _, err = self.runs[name].communicate(timeout=300)
    self.assertEqual(self.runs[name].returncode, 2, msg=err)
    lines = [l for l in err.splitlines() if l.startswith('error: ')]
    self.assertLen(lines, 1, msg=err)
    self.assertNotIn('Traceback', err)
    for words in _MISTAKES[name][1]:
      self.assertIn(words, lines[0])
    self.assertFalse((self.folder / 'runs' / name).exists())


class OtherMistakesTest(parameterized.TestCase):
  """Launchers without --config come as far as their own checks."""

  @parameterized.parameters(
    ('r1', ('--change=no_such=1',), 'no_such'),
    ('evolve', ('--change=no_such=1',), 'no_such'),
    ('r1_study', ('--change=no_such=1',), 'no_such'),
    ('evaluate', (), 'no config.json'),
    ('distill', (), 'a student needs both'),
  )
  def test_is_one_clear_line_and_status_2(self, verb, flags, words):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    run = _start(folder, verb, f'--workdir={folder / "run"}', *flags)
    _, err = run.communicate(timeout=300)
    self.assertEqual(run.returncode, 2, msg=err)
    lines = [l for l in err.splitlines() if l.startswith('error: ')]
    self.assertLen(lines, 1, msg=err)
    self.assertIn(words, lines[0])
    self.assertFalse((folder / 'run').exists())


class SweepTest(absltest.TestCase):
  def test_flags_of_a_new_sweep_need_a_config(self):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / 'sweep.json').write_text('{"runs": []}')
    run = _start(folder, 'sweep', f'--folder={folder}', '--seeds=5', '--dry')
    _, err = run.communicate(timeout=300)
    self.assertEqual(run.returncode, 2, msg=err)
    self.assertIn('error: --seeds: needs --config, too', err)


class ConfigFileTest(parameterized.TestCase):
  @parameterized.parameters(*_CONFIG_FILES)
  def test_without_other_flags_is_one_clear_line(self, name):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    text, words = _CONFIG_FILES[name]
    path = folder / f'{name}.py'
    if text is not None:
      path.write_text(text)
    run = _start(
      folder, 'pretrain', f'--config={path}', f'--workdir={folder / "run"}'
    )
    _, err = run.communicate(timeout=100)
    self.assertEqual(run.returncode, 2, msg=err)
    self.assertLen(err.splitlines(), 1, msg=err)
    for word in ('error: ', *words):
      self.assertIn(word, err)


_PROGRAM = """
from absl import flags
from deepseek_jax.cli import common
flags.DEFINE_string('workdir', None, '')
def main(argv):
  raise {error}
common.launch(main)
"""


class LaunchTest(parameterized.TestCase):
  @parameterized.parameters(
    ("PermissionError(13, 'Permission denied', '/x')", 2, '/x: Permission'),
    ("OSError(28, 'No space left', '/x')", 2, '/x: No space left; make room'),
    ('OSError()', 2, 'OSError'),
    ("OSError(28, 'No room')", 2, 'a file: No room; make room'),
    ("OSError(28, 'No room')", 2, 'a file below --workdir=w: No room', 'w'),
    ('OSError(28, "No room", b"\\xff")', 2, ': No room'),
    ('KeyboardInterrupt', 130, 'interrupted'),
  )
  def test_is_one_clear_line(self, error, status, words, workdir=''):
    flags = [f'--workdir={workdir}'] if workdir else []
    run = subprocess.run(
      [sys.executable, '-c', _PROGRAM.format(error=error), *flags],
      cwd=_ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, status, msg=run.stderr)
    self.assertLen(run.stderr.splitlines(), 1, msg=run.stderr)
    self.assertTrue(run.stderr.startswith('error: '))
    self.assertIn(words, run.stderr)


# name -> (flags, what the one line must say)
_SAMPLE_MISTAKES = {
  'bytes': (['--prompt=a\udcffb'], ['--prompt=', 'character 1', 'UTF-8']),
  'after': (['--prompt=a', '--after=\udcff'], ['--after=', 'UTF-8']),
  'temperature': (['--prompt=a', '--temperature=nan'], ['temperature = nan']),
  'infinite': (['--prompt=a', '--temperature=inf'], ['temperature = inf']),
  'none': (['--prompt=a', '--max_new_tokens=0'], ['--max_new_tokens=0']),
  'seed': (['--prompt=a', f'--seed={2**63}'], ['--seed=', '64 bits']),
  'prompt': ([], ['--prompt']),
  'stop': (['--prompt=a', '--stop='], ["--stop=''"]),
  'stop_bytes': (['--prompt=a', '--stop=\udcff'], ['--stop=', 'UTF-8']),
  'stop_chat': (['--chat', '--stop=a'], ['--stop', '--chat']),
}


class SampleMistakesTest(parameterized.TestCase):
  @parameterized.parameters(*_SAMPLE_MISTAKES)
  def test_is_one_clear_line_before_anything_is_read(self, name):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    flags, words = _SAMPLE_MISTAKES[name]
    run = _start(folder, 'sample', f'--workdir={folder}', *flags)
    out, err = run.communicate(timeout=100)
    self.assertEqual(run.returncode, 2, msg=err)
    self.assertEqual(out, '')
    self.assertLen(err.splitlines(), 1, msg=err)
    for word in ('error: ', *words):
      self.assertIn(word, err)


class RunTest(absltest.TestCase):
  def test_pretrain_then_sample(self):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    corpus = _corpus(folder / 'corpus')
    workdir = folder / 'run'
    run = _start(
      folder,
      'pretrain',
      *_TINY,
      f'--config.data.path={corpus}',
      f'--workdir={workdir}',
    )
    out, err = run.communicate(timeout=500)
    self.assertEqual(run.returncode, 0, msg=err)
    for words in (
      'held-out bits per byte',
      'uniform guess, bits per byte',
      'xz -9 bits per byte',
      'tokens per second',
      'expert load',
      'fill in the middle',
      'report.html',
    ):
      self.assertIn(words, out)
    page = (workdir / 'report.html').read_text()
    self.assertIn('<svg', page)

    draw = lambda *args: _start(
      folder,
      'sample',
      f'--workdir={workdir}',
      '--prompt=def f(',
      '--max_new_tokens=12',
      *args,
    )
    runs = [
      draw('--seed=1'),
      draw('--seed=1'),
      draw('--seed=2'),
      draw('--after=return x'),
      draw('--top_p=7'),
      draw('--max_new_tokens=1000000000'),
      draw('--temperature=0'),
      draw('--temperature=0', '--prompt=import x'),
    ]
    texts = [run.communicate(timeout=300) for run in runs]
    codes = [run.returncode for run in runs]
    self.assertEqual(codes, [0, 0, 0, 0, 2, 2, 0, 0], msg=texts)
    outs = [out for out, _ in texts]
    self.assertTrue(outs[0].startswith('def f('))
    self.assertEqual(outs[0], outs[1])
    self.assertNotEqual(outs[0], outs[2])
    self.assertTrue(outs[3].rstrip().endswith('return x'))
    self.assertIn('top_p = 7', texts[4][1])
    self.assertIn('max_new_tokens = 1000000000: the cache', texts[5][1])
    self.assertLen(texts[5][1].splitlines(), 1)
    alone, both = outs[6:]
    self.assertTrue(both.startswith(f'{alone}import x'), msg=both)

    text = alone.removeprefix('def f(').removesuffix('\n')
    stop, end = text[3:5], text.find(text[3:5])
    runs = [
      draw('--temperature=0', f'--stop={stop}'),
      draw('--temperature=0', f'--stop={stop}', '--prompt=import x'),
    ]
    one, two = [run.communicate(timeout=300)[0] for run in runs]
    self.assertEqual(one, f'def f({text[:end]}\n')
    self.assertTrue(two.startswith(f'{one}import x'), msg=two)
    self.assertNotIn(stop, two[len(one) :].removeprefix('import x'))


if __name__ == '__main__':
  absltest.main()
