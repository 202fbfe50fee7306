"""Lets a model climb a curriculum by itself: it learns from its own answers.

A round samples answers to problems of one level, has them verified, keeps the
best of each problem, trains on these and on some kept at earlier levels, and
measures held-out problems of all levels. When the level's accuracy passes a
bar, the next round is of the next level. No answer is a human's. Without
verification (a control) one answer of each problem is kept at random; levels
are passed by the same bar.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import build
from deepseek_jax.posttrain import chain, collect, measure, r1, synthetic
from deepseek_jax.posttrain.chain import ChainStage
from deepseek_jax.posttrain.evolve_recipe import EvolveRecipe
from deepseek_jax.posttrain.measure import Sampler
from deepseek_jax.posttrain.r1_runs import R1Runs
from deepseek_jax.rl import tasks
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.rl.sft import SFTConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.run import folder as folders
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)

BASE, FIRST = '1-base', '2-first-level'


@dataclasses.dataclass
class Evolve:
  """Holds the rounds in their folder.

  Attributes:
    recipe: of the rounds.
    folder: where they lie.
    console: whether runs show their progress.
  """

  recipe: EvolveRecipe
  folder: Path
  console: bool = True

  def run(self, say: Any = print) -> list[dict[str, Any]]:
    """Runs what is left of all rounds; returns the records of the rounds.

    Raises:
      InputError: the task or the start do not fit.
    """
    recipe, number = self.recipe, 0
    if not recipe.start:
      for number, stage in enumerate(self._first_stages(), start=1):
        chain.step(stage, self.folder, number, stage.name, say=say)
    self._open()
    start = ChainStage(
      'start', 'all levels are measured', lambda: self._measured(self._start)
    )
    first = chain.step(start, self.folder, number + 1, 'start', say=say)
    place, workdir, rounds = 0, self._start, []
    place = self._passed(first, place)
    for n in range(1, recipe.rounds + 1):
      if place == len(self._levels):
        break
      level, name = self._levels[place], f'round-{n:02}'
      stage = ChainStage(
        name,
        f'level {level}: sample, keep, train',
        lambda name=name, level=level, workdir=workdir: self._round(
          name, level, workdir
        ),
      )
      made = chain.step(stage, self.folder, number + 1 + n, name, say=say)
      rounds.append(made)
      told = ', '.join(
        f'{level}: {share:.2f}' for level, share in made['accuracy'].items()
      )
      say(f'{name}: held-out accuracy by level: {told}')
      if made['stuck']:
        say(f'{name}: no answer was right: the rounds end here')
        break
      place, workdir = self._passed(made, place), self.folder / name
    return rounds

  def _passed(self, record: dict[str, Any], place: int) -> int:
    """Returns the place of the first level from `place` on below the bar."""
    shares = record['accuracy']
    while (
      place < len(self._levels)
      and shares[str(self._levels[place])] >= self.recipe.bar
    ):
      place += 1
    return place

  # What begins.

  def _first_stages(self) -> list[ChainStage]:
    """Returns the stages that make the model that begins."""
    recipe, folder = self.recipe, self.folder
    runs = R1Runs(recipe.base, folder)
    text, first = folder / 'data' / 'text', folder / 'data' / 'first.jsonl'
    pretraining = runs.pretraining(recipe.base.model, text)
    known = Path(recipe.pretrained) if recipe.pretrained else folder / BASE
    tuning = runs.supervised(recipe.base.model, first, recipe.base.cold, known)
    base = ChainStage(
      BASE,
      'pretrained on text',
      lambda: self._fit(pretraining, folder / BASE),
      'run',
    )
    return [
      ChainStage('data', 'text, problems, first answers', self._write_data),
      *([] if recipe.pretrained else [base]),
      ChainStage(
        FIRST,
        'fine-tuned on the first level',
        lambda: self._fit(tuning, folder / FIRST),
        'run',
      ),
    ]

  def _write_data(self) -> dict[str, Any]:
    """Writes text, problems of all levels, and answers to the first level."""
    recipe, data = self.recipe, self.folder / 'data'
    told = r1.write_text(recipe.base, data / 'text')
    sums = [
      problem
      for level in recipe.levels
      for problem in synthetic.sums(
        recipe.base.seed, level, recipe.problems, carry=False
      )
    ]
    rng = random.Random(f'first level {recipe.base.seed}')
    problems = [synthetic.with_places(problem, rng) for problem in sums]
    chain.write_lines(data / 'problems.jsonl', problems)
    rewards = [{'kind': 'exact'}, {'kind': 'format', 'weight': 0.2}]
    task = {'problems': 'problems.jsonl', 'rewards': rewards, 'heldout': 0.1}
    chain.write(data / 'task.json', task)
    trained = {p['prompt'] for p in tasks.read(str(data / 'task.json')).train}
    first = [
      written
      for written, problem in zip(sums, problems)
      if problem['prompt'] in trained and problem['level'] == recipe.levels[0]
    ]
    # Sums of another length, too: that they end has to be seen.
    first += 3 * synthetic.sums(recipe.base.seed, 1, 81)
    asked = [first[n % len(first)] for n in range(recipe.base.first)]
    rng.shuffle(asked)
    said = list(synthetic.first_answers(asked, recipe.base.seed, 0.0, 0.0))
    # How columns of longer numbers are gone through, without a sum.
    said += synthetic.other_columns(recipe.base.seed, 3 * len(said) // 2)
    rng.shuffle(said)
    lesson = [synthetic.with_places(row, rng) for row in said]
    chain.write_lines(data / 'first.jsonl', lesson)
    return {**told, 'conversations': len(lesson)}

  def _open(self) -> None:
    """Reads the task and makes what samples.

    Raises:
      InputError: a problem has no level, or a level no held-out problem.
    """
    recipe = self.recipe
    path = recipe.task or str(self.folder / 'data' / 'task.json')
    self._task = tasks.read(path)
    for problem in (*self._task.train, *self._task.heldout):
      if type(problem.get('level')) is not int:
        raise InputError(
          f"{path}: the problem {problem['prompt'][:60]!r} has 'level' ="
          f' {problem.get("level")!r}: must be a whole number'
        )
    self._levels = sorted({p['level'] for p in self._task.train})
    lacking = set(self._levels) - {p['level'] for p in self._task.heldout}
    if lacking:
      raise InputError(
        f'{path}: no problem of level {min(lacking)} is held out; raise heldout'
      )
    self._start = Path(recipe.start) if recipe.start else self.folder / FIRST
    begun = folders.load(self._start)
    self._config, tokenizer = begun.config, begun.tokenizer
    self._taught = _conversations(begun.config)
    self._chat = begun.config.chat or ChatConfig('plain')
    if self._chat.format not in ('plain', 'r1_zero'):
      raise InputError(
        f'start = {str(self._start)!r}: its chat.format ='
        f" {self._chat.format!r}; answers are kept as plain text: 'plain' or"
        " 'r1_zero'"
      )
    self._tokenizer = begun.config.data.tokenizer
    if self._tokenizer == 'bpe':
      self._tokenizer = str(self._start / 'tokenizer.json')
    self._sampler = Sampler(
      build(begun.config.model),
      self._chat.build(tokenizer),
      tokenizer,
      context=begun.config.data.seq_len + 1,
      most=recipe.base.most,
      slots=recipe.base.slots,
    )

  # A round.

  def _round(self, name: str, level: int, before: Path) -> dict[str, Any]:
    """Returns what a round of a level reached; a killed one goes on."""
    kept = self.folder / 'kept' / f'{name}.jsonl'
    counts_path = kept.with_suffix('.json')
    if not counts_path.exists():
      chain.write(counts_path, self._collected(kept, level, before))
    counts = json.loads(counts_path.read_text())
    if not counts['kept']:  # nothing was right: there is nothing to learn
      return {**counts, **self._measured(before), 'stuck': True}
    self._answer_earlier(level, name, before)
    lesson = self.folder / 'kept' / f'{name}-lesson.jsonl'
    counts['replayed'] = self._write_lesson(lesson, name)
    trained = self._fit(self._training(lesson, before), self.folder / name)
    found = self._measured(self.folder / name)
    return {**counts, **trained, **found, 'stuck': False}

  def _collected(self, path: Path, level: int, before: Path) -> dict[str, Any]:
    """Writes the answers of a round that are kept; returns counts."""
    recipe = self.recipe
    asked = [p for p in self._task.train if p['level'] == level]
    rng = random.Random(f'{path.stem} {recipe.base.seed}')
    rng.shuffle(asked)
    return {
      'level': level,
      **collect.collect(
        path,
        self._sampler,
        folders.load(before).variables,
        asked[: recipe.asked],
        self._task.rewards,
        drawn=recipe.drawn,
        seed=rng.getrandbits(48),
        verify=recipe.verify,
      ),
    }

  def _kept_before(self, name: str) -> dict[int, Path]:
    """Returns the newest conversations of each level before a round."""
    out: dict[int, Path] = {}
    folder = self.folder / 'kept'
    # Those of levels that had no round of their own, then those of rounds.
    for pattern in ('level-*.json', 'round-??.json'):
      for counts in sorted(folder.glob(pattern)):
        told = json.loads(counts.read_text())
        if told['kept'] and (pattern[0] == 'l' or counts.stem < name):
          out[told['level']] = counts.with_suffix('.jsonl')
    return out

  def _answer_earlier(self, level: int, name: str, before: Path) -> None:
    """Writes answers to earlier levels that were passed without a round."""
    known = self._kept_before(name)
    for number in self._levels:
      path = self.folder / 'kept' / f'level-{number}.jsonl'
      counts = path.with_suffix('.json')
      if number < level and number not in known and not counts.exists():
        chain.write(counts, self._collected(path, number, before))

  def _write_lesson(self, path: Path, name: str) -> int:
    """Writes what a round trains on; returns how much of it is of before."""
    kept = self.folder / 'kept'
    rng = random.Random(f'lesson {name} {self.recipe.base.seed}')
    level = json.loads((kept / f'{name}.json').read_text())['level']
    # All rounds of this level: the newest answer to each problem.
    rows: dict[str, dict] = {}
    for counts in sorted(kept.glob('round-??.json')):
      if counts.stem > name or json.loads(counts.read_text())['level'] != level:
        continue
      for line in counts.with_suffix('.jsonl').read_text().splitlines():
        row = json.loads(line)
        rows[row['prompt']] = row
    before = []
    earlier = [
      p for n, p in sorted(self._kept_before(name).items()) if n < level
    ]
    for newest in (self._taught, *earlier):
      some = newest.read_text().splitlines() if newest else []
      before += rng.sample(some, min(self.recipe.replayed, len(some)))
    chain.write_lines(path, [*rows.values(), *map(json.loads, before)])
    return len(before)

  def _training(self, path: Path, before: Path) -> RunConfig:
    """Returns the run of a round."""
    recipe, seq_len = self.recipe, self._config.data.seq_len
    batch = recipe.base.batch
    return dataclasses.replace(
      self._config,
      data=dataclasses.replace(
        self._config.data,
        path=str(path),
        sources=None,
        tokenizer=self._tokenizer,
        heldout_fraction=0.0,
        fim_rate=0.0,
        seed=recipe.base.seed,
      ),
      train=dataclasses.replace(
        self._config.train,
        tokens=recipe.tokens,
        batch=BatchConfig(size=batch),
        schedule=ScheduleConfig('cosine', peak=recipe.rate, warmup=5),
        bias_rate=SwitchConfig(0.0, 0.0, 0.5),
      ),
      objective=SFTConfig(),
      rollouts=None,
      chat=self._chat,
      evaluate=dataclasses.replace(self._config.evaluate, every=0),
      seed=recipe.base.seed,
      checkpoint_every=max(1, round(recipe.tokens / (batch * seq_len) / 3)),
      keep=1,
      init_from=str(before),
    )

  def _fit(self, config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Trains a run, or what is left of it."""
    run = loop.fit(config, workdir, console=self.console)
    tokens = int(run.state.sequences) * config.data.seq_len
    return {'steps': int(run.state.step), 'tokens': tokens}

  def _measured(self, workdir: Path) -> dict[str, Any]:
    """Returns the held-out greedy accuracy of a run, by level."""
    asked, levels = [], []
    for level in self._levels:
      some = [p for p in self._task.heldout if p['level'] == level]
      asked += some[: self.recipe.measured]
      levels += [level] * len(some[: self.recipe.measured])
    answers = self._sampler.answers(
      folders.load(workdir).variables, [p['prompt'] for p in asked], 1, None
    )
    scored = measure.ScoredAnswers(
      self._sampler, answers, asked, self._task.rewards
    )
    right = {
      level: [bool(r) for r, l in zip(scored.right[:, 0], levels) if l == level]
      for level in self._levels
    }
    return {
      'accuracy': {str(l): sum(r) / len(r) for l, r in right.items()},
      'interval': {
        str(l): list(measure.wilson(sum(r), len(r))) for l, r in right.items()
      },
      'samples': [
        {'prompt': p['prompt'], 'text': t[0], 'right': bool(r[0])}
        for p, t, r, n in zip(asked, scored.texts, scored.right, range(1 << 30))
        if n == 0 or levels[n] != levels[n - 1]
      ],
    }


def _conversations(config: RunConfig) -> Path | None:
  """Returns the file of conversations that a run was trained on, if it was."""
  path = Path(config.data.path)
  is_file = path.suffix == '.jsonl' and path.is_file()
  return path if is_file and isinstance(config.objective, SFTConfig) else None
