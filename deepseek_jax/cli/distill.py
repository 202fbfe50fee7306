"""Trains a student by a teacher: on its answers, or on its distributions.

    python -m experiments.distill --teacher=runs/rl --task=task.json \\
      --answers=answers.jsonl --config=sft_tiny --workdir=runs/student
    python -m experiments.distill --teacher=runs/rl --config=distill_tiny \\
      --workdir=runs/student --config.data.path=chats.jsonl
    python -m experiments.distill --teacher=DIR --teacher=runs/rl=2 \\
      --config=distill_tiny --workdir=runs/student --config.objective.beta=1 \\
      --config.rollouts="{'prompts': 16, 'group': 4}" \\
      --config.data.path=task.json

With --task the teacher answers its training problems, the right answers are
written as conversations, and the student is fine-tuned on them (R1's way, for
any vocabulary); without --config they are written alone. Else the objective is
a divergence over the whole vocabulary: on given conversations, or with
--config.rollouts on the student's own answers (V4's way). A run that was ended
goes on, sampling too.
"""

import dataclasses
import os
from pathlib import Path

from absl import flags

from deepseek_jax import say
from deepseek_jax.cli import common, post_training, process_flags
from deepseek_jax.errors import InputError
from deepseek_jax.rl import harvest, tasks
from deepseek_jax.rl.answering import AnswerConfig, Asked
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.rl.sft import SFTConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.run import opening

_CONFIG = common.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a started run goes on from it.'
)
_TEACHER = flags.DEFINE_multi_string(
  'teacher', [], 'Folder of a run or from Hugging Face; FOLDER=WEIGHT of some.'
)
_TASK = flags.DEFINE_string(
  'task', None, 'Task whose training problems the teacher answers.'
)
_ANSWERS = flags.DEFINE_string(
  'answers', None, 'File .jsonl that its right answers are written to.'
)
_N = flags.DEFINE_integer('n', 4, 'Answers that are sampled of a problem.')
_KEEP = flags.DEFINE_enum(
  'keep',
  'all',
  ['all', 'shortest', 'first'],
  'Which of the right answers to a problem are kept.',
)
_NEW = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens of an answer.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0: the likeliest.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among this much probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the answers.')
_SLOTS = flags.DEFINE_integer('slots', 64, 'Answers that are made together.')
_FORMAT = flags.DEFINE_string(
  'chat_format',
  None,
  'How the teacher is asked; None: as it was trained, or by its template.',
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'What a teacher from Hugging Face that answers a task computes in.',
)
flags.declare_key_flag('config')
flags.adopt_module_key_flags(process_flags)


def main(argv: list[str]) -> None:
  """Samples answers, trains the student, or both, then reports."""
  del argv
  if bool(_CONFIG.value) != bool(_WORKDIR.value):
    raise InputError(
      '--config and --workdir: a student needs both; leave both out to write'
      ' the answers of --task alone'
    )
  config = _config() if _CONFIG.value else None
  if _TASK.value:
    _sample(config)
  if config is None:
    return
  if _TASK.value:
    data = dataclasses.replace(config.data, path=_ANSWERS.value)
    config = dataclasses.replace(config, data=data)
  run = loop.fit(config, _WORKDIR.value, console=not common.quiet())
  post_training.distilled(run, Path(_WORKDIR.value))


def _config() -> loop.RunConfig:
  """Returns the student's run; InputError where it does not fit the flags."""
  config = common.frozen(loop.RunConfig, _CONFIG.value)
  objective = config.objective
  if _TASK.value:
    if not isinstance(objective, SFTConfig):
      raise InputError(
        '--task: the student is fine-tuned on the answers; give a --config with'
        ' objective = sft, as sft_tiny, or leave --task out'
      )
    return config
  if not isinstance(objective, DistillConfig):
    raise InputError(
      f'objective = {type(objective).__name__}: distils nothing; give'
      ' --config=distill_tiny, or --task to learn from answers of the teacher'
    )
  if _TEACHER.value:
    objective = dataclasses.replace(objective, teachers=_teachers())
  return dataclasses.replace(config, objective=objective)


def _teachers() -> dict[str, float]:
  """Returns the folders of --teacher and their weights."""
  found: dict[str, float] = {}
  for given in _TEACHER.value:
    folder, weight = given, 1.0
    # A folder's name may hold a =.
    if not os.path.isdir(os.path.expanduser(given)) and '=' in given:
      folder, _, number = given.rpartition('=')
      try:
        weight = float(number)
      except ValueError:
        raise InputError(
          f'--teacher={given}: is no folder, and {number!r} is no weight'
        ) from None
    if folder in found:
      raise InputError(f'--teacher={folder}: is given twice; add its weights')
    found[folder] = weight
  return found


def _sample(config: loop.RunConfig | None) -> None:
  """Writes the right answers of the teacher to --answers."""
  if len(_TEACHER.value) != 1:
    raise InputError(
      f'--teacher: {len(_TEACHER.value)} given; one answers a task'
    )
  if not _ANSWERS.value:
    raise InputError('--answers is missing: name a .jsonl file to write')
  if config is not None and config.chat is None:
    raise InputError(
      'chat = None: set --config.chat, by which answers are read'
    )
  cfg = AnswerConfig(
    n=_N.value,
    most=_NEW.value,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
    slots=_SLOTS.value,
  )
  task = tasks.read(_TASK.value)
  teacher = opening.opened(_TEACHER.value[0], _DTYPE.value)
  form = _FORMAT.value
  folder = teacher.folder if form == 'template' else ''
  chat = ChatConfig(form, folder) if form else teacher.chat()
  asked = Asked(
    teacher.model,
    teacher.variables,
    teacher.tokenizer,
    chat.build(teacher.tokenizer),
    teacher.boundaries.begins,
  )
  found = harvest.harvest(
    asked,
    task,
    _ANSWERS.value,
    cfg,
    keep=_KEEP.value,
    about={'teacher': teacher.sha256, 'chat': chat.format},
    say=say.warn,
  )
  print(f'{_ANSWERS.value}: {found.line()}', flush=True)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, join=process_flags.join)
