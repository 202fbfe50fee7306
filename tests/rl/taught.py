"""A tiny run that answers sums with a digit or two and then stops."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax

import deepseek_jax as ds
from deepseek_jax.rl import tasks
from deepseek_jax.rl.answering import AnswerConfig, Asked
from deepseek_jax.run import opening
from tests.rl.sft_run_test import TINY

# Right is what is made of digits: the tiny model knows no sums.
OWN = 'def score(text, problem):\n  return float(text.isdigit())\n'
SLOTS = 8


def config(path: str, **changes) -> ds.RunConfig:
  """Returns fine-tuning of the tiny model on conversations."""
  made = ds.RunConfig(
    TINY,
    ds.DataConfig(
      path=path,
      tokenizer='bytes',
      vocab_size=261,
      seq_len=24,
      fim_rate=0.0,
      heldout_fraction=0.2,
    ),
    ds.TrainConfig(
      24 * 8 * 30,
      ds.BatchConfig(8),
      schedule=ds.ScheduleConfig('constant', peak=2e-2, warmup=0),
    ),
    objective=ds.SFTConfig(),
    chat=ds.ChatConfig('plain'),
    checkpoint_every=30,
  )
  return ds.changed(made, changes)


@functools.cache
def folder() -> str:
  """Returns a folder with chats.jsonl, task.json and the run `teacher`."""
  path = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  rows = [(f'{n}+{n % 7}=', str(n + n % 7)) for n in range(60)]
  with open(os.path.join(path, 'chats.jsonl'), 'w') as file:
    for prompt, said in rows:
      file.write(json.dumps({'prompt': prompt, 'completion': said}) + '\n')
  task(path)
  ds.fit(
    config(os.path.join(path, 'chats.jsonl')),
    os.path.join(path, 'teacher'),
    console=False,
  )
  return path


def task(path: str, count: int = 20, name: str = 'task.json', **changes) -> str:
  """Writes a task of sums into a folder; returns its path."""
  own = os.path.join(path, 'own.py')
  Path(own).write_text(OWN)
  lines = [json.dumps({'prompt': f'{n}+{n % 7}='}) for n in range(count)]
  Path(path, 'problems.jsonl').write_text('\n'.join(lines))
  spec = {
    'problems': 'problems.jsonl',
    'rewards': [{'kind': 'own', 'file': own}],
    'heldout': 0.4,
    **changes,
  }
  made = os.path.join(path, name)
  Path(made).write_text(json.dumps(spec))
  return made


@functools.cache
def opened() -> opening.Opened:
  """Returns the run, read back."""
  return opening.opened(os.path.join(folder(), 'teacher'))


@functools.cache
def asked() -> Asked:
  """Returns the run as one that is asked."""
  source = opened()
  chat = source.chat().build(source.tokenizer)
  return Asked(source.model, source.variables, source.tokenizer, chat)


def read() -> tasks.Task:
  """Returns the task."""
  return tasks.read(os.path.join(folder(), 'task.json'))


def sampled(**changes) -> AnswerConfig:
  """Returns how its answers are sampled."""
  return AnswerConfig(**{'n': 3, 'most': 6, 'slots': SLOTS, **changes})


def zeros() -> dict:
  """Returns variables of no knowledge."""
  return jax.tree.map(lambda a: 0 * a, opened().variables)
