"""The launcher as a user meets it: mistakes are one line, and status 2."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl.testing import absltest, parameterized

from deepseek_jax.cli import extras
from deepseek_jax.errors import InputError
from deepseek_jax.serve.config import KEY_VARIABLE

_ROOT = Path(__file__).parents[2]


def _start(*args, **env):
  env = {k: v for k, v in os.environ.items() if k != KEY_VARIABLE} | env
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.serve', *args],
    cwd=_ROOT,
    env=env | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


# name -> (flags, environment, words of the line)
_MISTAKES = {
  'nothing': ([], {}, ['--workdir', '--hf']),
  'host': (['--host=0.0.0.0', '--workdir=x'], {}, ['--host=0.0.0.0', 'key']),
  'key': (['--workdir=x'], {KEY_VARIABLE: 'short'}, ['5 characters', '16']),
  'file': (['--api_key_file=/no/file'], {}, ['--api_key_file=/no/file']),
  'chunks': (
    ['--workdir=x', '--chunks=1x8,64'],
    {},
    ['--chunks=1x8,64', '1x64'],
  ),
  'rows': (['--workdir=x', '--chunks=0x8'], {}, ['engine.chunks', '(0, 8)']),
  'run': (['--workdir=/no/run'], {}, ['/no/run', 'no run']),
}


class MistakesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.runs = {n: _start(*f, **e) for n, (f, e, _) in _MISTAKES.items()}

  @parameterized.parameters(*_MISTAKES)
  def test_is_one_clear_line_and_status_2(self, name):
    out, err = self.runs[name].communicate(timeout=200)
    self.assertEqual(self.runs[name].returncode, 2, msg=err)
    self.assertEqual(out, '')
    self.assertLen(err.splitlines(), 1, msg=err)
    for word in ('error: ', *_MISTAKES[name][2]):
      self.assertIn(word, err)

  def test_missing_packages_are_named_with_their_extra(self):
    needed = {'json': 'json', 'no_such_module': 'its-package'}
    with self.assertRaisesRegex(
      InputError, "its-package, the extra 'serve': pip install"
    ):
      extras.check('serve', needed)


_PROGRAM = """
import sys, threading
from tests.serve import served
from tests.serve.fake_engine import FakeEngine
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.process import Server
engine = FakeEngine(served.BYTES, stop=1)
engine.pace = 0.05
server = Server(served.served_bytes(), engine, ServeConfig(port=0))
print(server.url, flush=True)
server.run()
assert engine.threads == {threading.main_thread().ident}
print('ended', flush=True)
"""


class SignalTest(parameterized.TestCase):
  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  def test_what_is_under_way_ends_before_the_process(self, number):
    import httpx2 as httpx

    run = subprocess.Popen(
      [sys.executable, '-c', _PROGRAM],
      cwd=_ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    url = run.stdout.readline().strip()
    while httpx.get(url + '/ready').status_code != 200:
      time.sleep(0.05)
    body = {'prompt': 'abcdefgh', 'temperature': 0, 'stream': True}
    with httpx.stream('POST', url + '/v1/completions', json=body) as answer:
      lines = answer.iter_lines()
      next(lines)
      run.send_signal(number)
      rest = list(lines)
    self.assertIn('data: [DONE]', rest)
    out, err = run.communicate(timeout=30)
    self.assertEqual((run.returncode, out), (0, 'ended\n'), msg=err)


class FolderTest(absltest.TestCase):
  def test_keys_of_a_file_that_is_no_text_are_one_line(self):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / 'keys').write_bytes(b'\xff\xfe\x00')
    run = _start(f'--api_key_file={folder / "keys"}', '--workdir=x')
    _, err = run.communicate(timeout=100)
    self.assertEqual(run.returncode, 2)
    self.assertLen(err.splitlines(), 1, msg=err)


if __name__ == '__main__':
  absltest.main()
