"""The launchers distill and evaluate, in this process and as programs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.record import results
from deepseek_jax.run import sources
from tests import tiny
from tests.rl import taught
from tests.run.distill_run_test import STUDENT

ROOT = Path(__file__).parents[2]
TEXT = 'def f(a):\n  b = a\n  return b\n'

pytestmark = pytest.mark.slow


class Launched(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)
    self.run_folder = os.path.join(self.folder, 'run')
    shutil.copytree(os.path.join(taught.folder(), 'teacher'), self.run_folder)
    self.task = os.path.join(taught.folder(), 'task.json')

  def start(self, verb, *args):
    return subprocess.run(
      [sys.executable, '-m', f'experiments.{verb}', *args],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=600,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'COLUMNS': '120',
        'XDG_CACHE_HOME': os.path.join(self.folder, 'cache'),
      },
    )

  def check_refused(self, verb, cases):
    """Each case's flags end with one line of its message."""
    known = {'RUN': self.run_folder, 'TASK': self.task}
    given = [
      {n: known.get(v, v) if isinstance(v, str) else v for n, v in f.items()}
      for f, _ in cases
    ]
    done = subprocess.run(
      [sys.executable, '-m', 'tests.cli.measuring_worker'],
      input=json.dumps([verb, given]),
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=600,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    for (flags, message), said in zip(
      cases, json.loads(done.stdout), strict=True
    ):
      with self.subTest(message):
        self.assertRegex(said, message, flags)
        self.assertNotIn('\n', said)

  def file(self, name, text):
    path = os.path.join(self.folder, name)
    Path(path).write_text(text)
    return path


class EvaluateTest(Launched):
  @pytest.mark.slow
  def test_a_run_is_measured_and_nothing_is_lost(self):
    quiz = {'question': '3+3=', 'choices': ['6', 'x'], 'answer': 0}
    given = (
      f'--workdir={self.run_folder}',
      '--bits',
      f'--choices={self.file("quiz.jsonl", json.dumps(quiz))}',
      f'--task={self.task}',
      f'--infill={self.file("code.py", TEXT)}',
      *('--n=2', '--k=1', '--k=2', '--max_new_tokens=6', '--slots=4'),
    )
    done = self.start('evaluate', *given)
    self.assertEqual(done.returncode, 0, done.stderr)
    for name in ('pass@1', 'pass@2', 'accuracy_by_bytes', 'bits per byte'):
      self.assertIn(name, done.stdout)
    found = results.whole(Path(self.run_folder))
    self.assertIsNone(results.read(Path(self.run_folder)))  # no run's end
    entries = found['evaluations']
    self.assertEqual(
      [e['what'] for e in entries],
      ['bits per byte', 'choices', 'pass@k', 'infill'],
    )
    self.assertEqual({e['step'] for e in entries}, {30})
    # Bits per byte as the trainer computes them.
    source = taught.opened()
    store = sources.opened(source.config, lambda line: None)
    held = sources.heldout(store, source.config, None)
    want = ds.bits_per_byte(source.model, source.variables, held)
    np.testing.assert_allclose(entries[0]['bits_per_byte'], want, rtol=1e-6)
    # Once more, from what is written: the same, and not twice.
    again = self.start('evaluate', *given)
    self.assertEqual(again.returncode, 0, again.stderr)
    self.assertEqual(results.whole(Path(self.run_folder)), found)
    self.assertNotIn('problems', again.stderr)  # nothing was sampled anew
    # The folder is still a run's.
    self.assertEqual(ds.load(self.run_folder).step, 30)

  @pytest.mark.slow
  def test_a_hugging_face_folder_is_measured(self):
    folder = os.path.join(self.folder, 'hf')
    weights = tiny.draw(ds.build(STUDENT))
    hf.save(folder, STUDENT, weights, extra={'eos_token_id': 1})
    shutil.copy(os.path.join(self.run_folder, 'tokenizer.json'), folder)
    quiz = {'question': '3+3=', 'choices': ['6', 'x'], 'answer': 0}
    out = os.path.join(self.folder, 'measured')
    done = self.start(
      'evaluate',
      f'--hf={folder}',
      f'--out={out}',
      f'--choices={self.file("quiz.jsonl", json.dumps(quiz))}',
      f'--task={self.task}',
      f'--infill={self.file("code.py", TEXT)}',
      '--chat_format=plain',
      *('--n=1', '--k=1', '--max_new_tokens=4', '--slots=4'),
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    entries = results.whole(Path(out))['evaluations']
    told = [e['what'] for e in entries]
    self.assertEqual(told, ['choices', 'pass@k', 'infill'])

  def test_wrong_input_is_one_line(self):
    run = {'workdir': 'RUN'}
    cases = (
      ({}, 'give either --workdir=RUN or --hf=FOLDER'),
      ({'hf': 'x', 'bits': True}, '--out is missing'),
      (run, 'nothing to measure'),
      (run | {'k': [2]}, 'k = 2: must lie in 1..n = 1'),
      (run | {'task': ['/nowhere']}, '/nowhere: is no file of JSON'),
      (run | {'choices': ['/nowhere']}, '/nowhere: cannot be read'),
      (run | {'infill': 'heldout'}, 'trained on conversations'),
      (run | {'infill': '/nowhere'}, 'does not exist'),
      (run | {'limit': 0}, '--limit=0: must be at least 1'),
      (run | {'chat_format': 'v9', 'bits': True}, "format = 'v9'"),
      ({'task': ['x'], 'n': 2, 'temperature': 0.0}, 'n = 2: at answers.temp'),
    )
    self.check_refused('evaluate', cases)


class DistillTest(Launched):
  @pytest.mark.slow
  def test_answers_of_a_teacher_teach_a_student(self):
    made = taught.config('chats.jsonl', **{'train.tokens': 24 * 8 * 2.0})
    config = self.file(
      'own.py',
      'import deepseek_jax as ds\n'
      f'def get_config(): return ds.from_dict(ds.RunConfig,'
      f' {ds.to_dict(made)!r})\n',
    )
    answers = os.path.join(self.folder, 'answers.jsonl')
    student = os.path.join(self.folder, 'student')
    given = (
      f'--teacher={self.run_folder}',
      f'--task={self.task}',
      f'--answers={answers}',
      '--max_new_tokens=6',
      '--slots=8',
      f'--config={config}',
      f'--workdir={student}',
    )
    done = self.start('distill', *given)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r'answers.jsonl: .* problems: .* are kept')
    run = ds.load(student)
    self.assertEqual(run.config.data.path, answers)
    # The same command finds all done.
    again = self.start('distill', *given)
    self.assertEqual(again.returncode, 0, again.stderr)

  @pytest.mark.slow
  def test_a_divergence_towards_a_teacher_is_learnt(self):
    made = taught.config(
      os.path.join(taught.folder(), 'chats.jsonl'),
      **{'train.tokens': 24 * 8 * 2.0, 'objective': ds.DistillConfig(beta=0.0)},
    )
    config = self.file(
      'own.py',
      'import deepseek_jax as ds\n'
      f'def get_config(): return ds.from_dict(ds.RunConfig,'
      f' {ds.to_dict(made)!r})\n',
    )
    student = os.path.join(self.folder, 'student')
    given = f'--config={config}', f'--workdir={student}'
    done = self.start('distill', *given, f'--teacher={self.run_folder}=2')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('held-out bits per byte of answers', done.stdout)
    teachers = ds.load(student).config.objective.teachers
    self.assertEqual(teachers, {self.run_folder: 2.0})

  def test_wrong_input_is_one_line(self):
    one = {'task': 'TASK', 'teacher': ['/no']}
    cases = (
      ({'workdir': 'x'}, '--config and --workdir: a student needs both'),
      ({'task': 'TASK'}, '--teacher: 0 given; one answers a task'),
      ({'task': 'TASK', 'teacher': ['a', 'b']}, '--teacher: 2 given'),
      (one, '--answers is missing'),
      (one | {'answers': 'a.jsonl'}, '/no: is no'),
      (one | {'answers': 'a.jsonl', 'task': '/no'}, 'is no file of JSON'),
      (one | {'answers': 'a.jsonl', 'n': 0}, 'answers.n = 0'),
    )
    self.check_refused('distill', cases)


if __name__ == '__main__':
  absltest.main()
