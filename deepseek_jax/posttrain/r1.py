"""Builds R1's pipeline in small: every stage of a recipe, in order.

Text -> base -> cold start -> reinforcement -> rejection sampling and
fine-tuning of the base -> reinforcement -> a dense student -> Hugging Face
(arXiv:2501.12948). After each stage held-out problems are answered and scored.
"""

import dataclasses
import functools
import json
import random
from pathlib import Path
from typing import Any

from deepseek_jax import say
from deepseek_jax.data import corpus
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import build
from deepseek_jax.posttrain import chain, collect, handover, measure, synthetic
from deepseek_jax.posttrain.chain import ChainStage
from deepseek_jax.posttrain.measure import Sampler
from deepseek_jax.posttrain.r1_recipe import R1Recipe
from deepseek_jax.posttrain.r1_runs import HELD_OUT, R1Runs
from deepseek_jax.rl import tasks
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.run import folder as folders
from deepseek_jax.run.config import RunConfig

BASE, COLD, REINFORCED = '1-base', '2-cold-start', '3-reinforced'
TUNED, AGAIN = '4-fine-tuned', '5-reinforced'
STUDENT_BASE, STUDENT = '6-student-base', '7-student'
MODELS = (BASE, COLD, REINFORCED, TUNED, AGAIN, STUDENT_BASE, STUDENT)
_DOCUMENTS = 32  # of the text, at least


def rewards(recipe: R1Recipe) -> list[dict]:
  """Returns the rewards: the right answer, and a little for the form."""
  return [
    {'kind': 'exact', 'only': 'answer'},
    {'kind': 'countdown', 'only': 'numbers'},
    {'kind': 'format', 'weight': recipe.format_weight},
  ]


def write_text(recipe: R1Recipe, folder: Path) -> dict[str, Any]:
  """Writes the synthetic text as documents, of which some are held out."""
  lines = synthetic.text(recipe.seed, recipe.lines).splitlines(keepends=True)
  folder.mkdir(parents=True, exist_ok=True)
  # A hash of the text decides; of a few documents it may choose none.
  for count in range(_DOCUMENTS, 10 * _DOCUMENTS):
    parts = [''.join(lines[n::count]) for n in range(count)]
    if any(corpus.is_held_out(part, HELD_OUT) for part in parts):
      break
  for n, part in enumerate(parts):
    (folder / f'{n:02}.txt').write_text(part)
  return {'bytes': sum(map(len, lines))}


def write_task(recipe: R1Recipe, path: Path) -> dict[str, Any]:
  """Writes the task: its problems beside it, in a mixed order.

  Raises:
    InputError: a prompt is too long, or of a kind no problem is held out.
  """
  problems = synthetic.sums(recipe.seed, recipe.digits, recipe.additions)
  problems += synthetic.countdowns(recipe.seed, recipe.countdowns)
  random.Random(f'order {recipe.seed}').shuffle(problems)
  chain.write_lines(path.with_name('problems.jsonl'), problems)
  chain.write(
    path,
    {
      'problems': 'problems.jsonl',
      'rewards': rewards(recipe),
      'heldout': recipe.heldout,
    },
  )
  task = tasks.read(str(path))
  longest = max(len(p['prompt'].encode()) for p in problems)
  if longest + recipe.most > recipe.seq_len + 1:
    raise InputError(
      f'seq_len = {recipe.seq_len}: prompts of {longest} bytes and most ='
      f' {recipe.most} do not fit; raise seq_len'
    )
  kinds = lambda some: {measure.kind_of(problem) for problem in some}
  lacking = kinds(problems) - kinds(task.heldout)
  if lacking:
    raise InputError(
      f'heldout = {recipe.heldout}: of {min(lacking)} no problem is held out;'
      ' raise it, or make more problems'
    )
  return {'problems': len(task.train), 'heldout': len(task.heldout)}


def write_first_answers(recipe: R1Recipe, task: Path, path: Path) -> dict:
  """Writes the cold start's conversations, of problems that are trained on."""
  train = list(tasks.read(str(task)).train)
  rng = random.Random(f'first {recipe.seed}')
  asked = [train[n % len(train)] for n in range(recipe.first)]
  rng.shuffle(asked)
  said = synthetic.first_answers(asked, recipe.seed, recipe.forget, recipe.miss)
  chain.write_lines(path, list(said))
  return {'conversations': len(asked)}


@dataclasses.dataclass
class R1Chain:
  """Holds a pipeline in its folder.

  Attributes:
    recipe: of all stages.
    folder: where they lie.
    console: whether runs show their progress.
  """

  recipe: R1Recipe
  folder: Path
  console: bool = True

  def __post_init__(self) -> None:
    """Makes the runs; trains nothing."""
    self.runs = R1Runs(self.recipe, self.folder)
    self._samplers: dict[str, Sampler] = {}

  @property
  def data(self) -> Path:
    """Returns the folder of text, problems and answers."""
    return self.folder / 'data'

  @property
  def task_path(self) -> Path:
    """Returns the path of the task."""
    return self.data / 'task.json'

  @functools.cached_property
  def task(self) -> tasks.Task:
    """Returns the task, once it is written."""
    return tasks.read(str(self.task_path))

  def stages(self) -> list[ChainStage]:
    """Returns all stages, each with the measurement after it."""
    recipe, runs, at = self.recipe, self.runs, self._at
    cold, kept = self.data / 'cold.jsonl', self.data / 'kept.jsonl'
    taught, text = self.data / 'taught.jsonl', self.data / 'text'
    model, student = recipe.model, recipe.student
    return [
      ChainStage('data', 'text, problems, first answers', self._write_data),
      *self._trained(BASE, 'pretrained on text', runs.pretraining(model, text)),
      *self._trained(
        COLD,
        'fine-tuned on a biased teacher',
        runs.supervised(model, cold, recipe.cold, at(BASE)),
      ),
      *self._trained(
        REINFORCED,
        'GRPO with verifiers',
        runs.reinforcement(self.task_path, recipe.rounds, at(COLD)),
      ),
      ChainStage(
        'kept',
        'rejection sampling',
        lambda: self.collected(REINFORCED, kept, 'kept'),
      ),
      *self._trained(
        TUNED,
        'base, fine-tuned on what was kept',
        runs.supervised(model, kept, recipe.sft, at(BASE)),
      ),
      *self._trained(
        AGAIN,
        'GRPO once more',
        runs.reinforcement(self.task_path, recipe.more_rounds, at(TUNED)),
      ),
      ChainStage(
        'taught',
        "the teacher's verified answers",
        lambda: self.collected(AGAIN, taught, 'taught'),
      ),
      *self._trained(
        STUDENT_BASE,
        'Llama, pretrained on text',
        runs.pretraining(student, text),
        measured=False,
      ),
      *self._trained(
        STUDENT,
        'Llama, fine-tuned on the teacher',
        runs.supervised(student, taught, recipe.distill, at(STUDENT_BASE)),
      ),
      ChainStage('exported', 'Hugging Face folders', self._export),
    ]

  def _at(self, name: str) -> Path:
    """Returns the folder of a stage's run."""
    return self.folder / name

  def _trained(
    self, name: str, what: str, config: RunConfig, *, measured: bool = True
  ) -> list[ChainStage]:
    """Returns the stage of a run, and that of its measurement."""
    train = ChainStage(name, what, lambda: self.train(name, config), 'run')
    score = ChainStage(
      f'{name}-measured',
      f'{name} answers held-out problems',
      lambda: self.measured(self._at(name)),
      'measure',
    )
    return [train, score] if measured else [train]

  def _write_data(self) -> dict[str, Any]:
    """Writes all that is made without a model."""
    return {
      **write_text(self.recipe, self.data / 'text'),
      **write_task(self.recipe, self.task_path),
      **write_first_answers(
        self.recipe, self.task_path, self.data / 'cold.jsonl'
      ),
    }

  def train(self, name: str, config: RunConfig) -> dict[str, Any]:
    """Trains the run of a stage, or what is left of it."""
    run = loop.fit(config, self._at(name), console=self.console)
    return {
      'steps': int(run.state.step),
      'tokens': int(run.state.sequences) * config.data.seq_len,
      'skipped_updates': int(run.state.gate.skipped),
    }

  def sampler(self, config: RunConfig) -> Sampler:
    """Returns what draws answers of a run's model."""
    key = json.dumps(folders.as_json(config)['model'], sort_keys=True)
    if key not in self._samplers:
      tokenizer = ByteTokenizer()
      self._samplers[key] = Sampler(
        build(config.model),
        ChatConfig('plain').build(tokenizer),
        tokenizer,
        context=self.recipe.seq_len + 1,
        most=self.recipe.most,
        slots=self.recipe.slots,
      )
    return self._samplers[key]

  def heldout(self) -> list[dict]:
    """Returns the held-out problems that are measured: as many of each kind."""
    out: dict[str, list[dict]] = {}
    for problem in self.task.heldout:
      out.setdefault(measure.kind_of(problem), []).append(problem)
    return [
      p for kind in sorted(out) for p in out[kind][: self.recipe.measured]
    ]

  def measured(self, workdir: Path) -> dict[str, Any]:
    """Returns what the newest weights of a run answer to held-out problems."""
    loaded = folders.load(workdir)
    return measure.measured(
      self.sampler(loaded.config),
      loaded.variables,
      self.heldout(),
      self.task.rewards,
      draws=self.recipe.draws,
      seed=self.recipe.seed,
    )

  def collected(self, name: str, path: Path, what: str) -> dict[str, Any]:
    """Writes what a run answers to problems that are trained on, if right."""
    loaded = folders.load(self._at(name))
    asked = list(self.task.train)
    random.Random(f'{what} {self.recipe.seed}').shuffle(asked)
    counts = collect.collect(
      path,
      self.sampler(loaded.config),
      loaded.variables,
      asked[: self.recipe.asked],
      self.task.rewards,
      drawn=self.recipe.drawn,
      seed=random.Random(f'draws {what} {self.recipe.seed}').getrandbits(48),
    )
    collect.check_some(counts, str(path))
    return counts

  def _export(self) -> dict[str, Any]:
    """Writes teacher and student as Hugging Face folders, and compares them."""
    out = {}
    for name, folder in ((AGAIN, 'hf-teacher'), (STUDENT, 'hf-student')):
      loaded = folders.load(self._at(name))
      prompts = [problem['prompt'] for problem in self.heldout()]
      out[folder] = handover.handed_over(
        self.folder / folder,
        loaded,
        self.sampler(loaded.config),
        prompts[:: max(1, len(prompts) // 16)],
        most=self.recipe.most,
      )
      told = out[folder]
      if told['equal'] != told['compared'] or not told['compared']:
        say.warn(
          f'{folder}: transformers gives {told["equal"]} of {told["compared"]}'
          f' answers that are ours {told.get("note", "")}'.strip()
        )
    return {'folders': out}
