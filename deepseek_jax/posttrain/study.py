"""Compares reinforcement with its controls, and self-improvement with its own.

Every seed has a chain of its own, as `r1` makes it: the arms of a seed begin
with the same weights. An arm that has ended is not run again, so a study may be
done arm by arm. Recipes are fixed before any arm has run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import build
from deepseek_jax.posttrain import chain, collect, measure, r1
from deepseek_jax.posttrain.chain import ChainStage
from deepseek_jax.posttrain.evolve import FIRST, Evolve
from deepseek_jax.posttrain.evolve_recipe import EvolveRecipe
from deepseek_jax.posttrain.r1 import R1Chain
from deepseek_jax.posttrain.r1_recipe import R1Recipe
from deepseek_jax.record import comparison
from deepseek_jax.run import folder as folders

# In the order of their value: a study may end after any of them.
ARMS = {
  'grpo': 'reinforcement: verified rewards',
  'permuted': 'control: rewards dealt out at random',
  'sft': 'control: fine-tuning on as many sampled answers that were right',
  'floor': 'control: the untrained model',
  'evolve': 'self-improvement with verification',
  'unverified': 'control: self-improvement without',
}
# Seconds of an arm of the default recipe on two cores, measured beside another
# run; what has run is known better.
SECONDS = {
  'start': 290.0,
  'grpo': 390.0,
  'permuted': 410.0,
  'sft': 330.0,
  'floor': 40.0,
  'evolve': 1900.0,
  'unverified': 1300.0,
}


@dataclasses.dataclass(frozen=True)
class StudyRecipe:
  """Describes a study.

  Attributes:
    r1: of every seed; its `seed` is the first one's.
    evolve: of every seed, but for seed, start and verify.
    seeds: how many.
  """

  r1: R1Recipe = dataclasses.field(default_factory=R1Recipe)
  evolve: EvolveRecipe = dataclasses.field(default_factory=EvolveRecipe)
  seeds: int = 2

  def __post_init__(self) -> None:
    """Raises InputError for less than one seed."""
    if type(self.seeds) is not int or self.seeds < 1:
      raise InputError(f'seeds = {self.seeds}: must be at least 1')


@dataclasses.dataclass
class Study:
  """Holds a study in its folder."""

  recipe: StudyRecipe
  folder: Path
  console: bool = True

  def seed_folder(self, number: int) -> Path:
    """Returns the folder of a seed."""
    return self.folder / f'seed={self.recipe.r1.seed + number}'

  def _r1(self, number: int) -> R1Chain:
    """Returns the chain of a seed."""
    seed = self.recipe.r1.seed + number
    recipe = dataclasses.replace(self.recipe.r1, seed=seed)
    return R1Chain(recipe, self.seed_folder(number), self.console)

  def ended(self, number: int, arm: str) -> bool:
    """Returns whether an arm of a seed has ended."""
    return chain.found(self.seed_folder(number), f'arm-{arm}') is not None

  def left(self, arms: Sequence[str]) -> list[tuple[int, str]]:
    """Returns the arms that have not ended: seed by seed, by their value."""
    return [
      (number, arm)
      for number in range(self.recipe.seeds)
      for arm in ARMS
      if arm in arms and not self.ended(number, arm)
    ]

  def seconds(self, arms: Sequence[str]) -> float:
    """Returns what is left, in seconds: by arms that ended, or by SECONDS."""
    out = 0.0
    for number, arm in self.left(arms):
      known = [
        record['seconds']
        for other in range(self.recipe.seeds)
        if (record := chain.found(self.seed_folder(other), f'arm-{arm}'))
      ]
      out += sum(known) / len(known) if known else SECONDS[arm]
      started = chain.found(self.seed_folder(number), f'{r1.COLD}-measured')
      if arm == 'grpo' and not started:
        out += SECONDS['start']
    return out

  def run(self, number: int, arm: str, say: Callable = print) -> None:
    """Runs what is left of an arm of a seed."""
    made = self._r1(number)
    chain.claim(made.folder, made.recipe)
    begin = made.stages()
    last = [s.name for s in begin].index(f'{r1.COLD}-measured') + 1
    for place, stage in enumerate(begin[:last], start=1):
      chain.step(stage, made.folder, place, stage.name, say=say)
    doing = {
      'grpo': self._grpo,
      'permuted': self._permuted,
      'sft': self._tuned,
      'floor': self._floor,
      'evolve': self._evolve,
      'unverified': self._evolve,
    }[arm]
    stage = ChainStage(
      f'arm-{arm}', ARMS[arm], lambda: doing(made, arm, say), 'arm'
    )
    place = 100 + list(ARMS).index(arm)
    chain.step(stage, made.folder, place, f'{made.folder.name} {arm}', say=say)

  # The arms.

  def _grpo(self, made: R1Chain, arm: str, say: Callable) -> dict[str, Any]:
    """Reinforces as the pipeline does: its own stages."""
    names = [s.name for s in made.stages()]
    wanted = (r1.REINFORCED, f'{r1.REINFORCED}-measured')
    for name in wanted:
      place = names.index(name)
      stage = made.stages()[place]
      chain.step(stage, made.folder, place + 1, name, say=say)
    return {'reached': chain.found(made.folder, wanted[1])}

  def _permuted(self, made: R1Chain, arm: str, say: Callable) -> dict[str, Any]:
    """Reinforces with the same rounds and permuted rewards."""
    config = made.runs.reinforcement(
      made.task_path,
      made.recipe.rounds,
      made.folder / r1.COLD,
      permuted=True,
    )
    trained = made.train(arm, config)
    return {**trained, 'reached': made.measured(made.folder / arm)}

  def _tuned(self, made: R1Chain, arm: str, say: Callable) -> dict[str, Any]:
    """Trains on sampled answers that were right.

    As many answers are sampled as reinforcement samples, and as many tokens
    trained on.
    """
    recipe, path = made.recipe, made.data / 'sampled.jsonl'
    sampled = recipe.rounds * recipe.prompts * recipe.group
    problems = list(made.task.train)
    loaded = folders.load(made.folder / r1.COLD)
    counts_path = path.with_suffix('.json')
    if not counts_path.exists():
      counts = collect.collect(
        path,
        made.sampler(loaded.config),
        loaded.variables,
        problems,
        made.task.rewards,
        drawn=max(1, math.ceil(sampled / len(problems))),
        seed=recipe.seed,
      )
      chain.write(counts_path, counts)
    config = made.runs.supervised(
      recipe.model,
      path,
      float(sampled * recipe.seq_len),
      made.folder / r1.COLD,
    )
    trained = made.train(arm, config)
    return {**trained, 'reached': made.measured(made.folder / arm)}

  def _floor(self, made: R1Chain, arm: str, say: Callable) -> dict[str, Any]:
    """Measures weights that were never trained."""
    config = folders.config_of(made.folder / r1.BASE)
    state = folders.fresh_state(config, build(config.model))
    variables = {'params': state.params, 'buffers': state.buffers}
    return {
      'reached': measure.measured(
        made.sampler(config),
        variables,
        made.heldout(),
        made.task.rewards,
        draws=made.recipe.draws,
        seed=made.recipe.seed,
      )
    }

  def _evolve(self, made: R1Chain, arm: str, say: Callable) -> dict[str, Any]:
    """Climbs levels with verification, or without from the same start."""
    verified = made.folder / 'evolve'
    base = dataclasses.replace(self.recipe.evolve.base, seed=made.recipe.seed)
    # The text is the same: one base serves all arms of a seed.
    recipe = dataclasses.replace(
      self.recipe.evolve, base=base, pretrained=str(made.folder / r1.BASE)
    )
    if arm == 'unverified':
      if not (verified / FIRST / 'config.json').exists():
        raise InputError(
          f'{arm}: begins as the arm evolve does, which has not begun; run it'
          ' first'
        )
      recipe = dataclasses.replace(
        recipe,
        verify=False,
        start=str(verified / FIRST),
        task=str(verified / 'data' / 'task.json'),
      )
    folder = made.folder / arm
    chain.claim(folder, recipe)
    rounds = Evolve(recipe, folder, self.console).run(say)
    start = chain.found(folder, 'start')
    accuracy = rounds[-1]['accuracy'] if rounds else start['accuracy']
    passed = [l for l, share in accuracy.items() if share >= recipe.bar]
    return {
      'start': start['accuracy'],
      'accuracy': accuracy,
      'levels': len(passed),
      'rounds': len(rounds),
    }

  # What came out.

  def results(self) -> dict[str, Any]:
    """Returns values, means and intervals of all arms that have ended."""
    arms: dict[str, Any] = {}
    for arm, what in ('start', 'all arms begin here'), *ARMS.items():
      values: dict[str, dict[str, float]] = {}
      for number in range(self.recipe.seeds):
        folder = self.seed_folder(number)
        name = f'{r1.COLD}-measured' if arm == 'start' else f'arm-{arm}'
        record = chain.found(folder, name)
        if record:
          values[folder.name] = _numbers(record.get('reached', record))
      arms[arm] = {'what': what, 'seeds': values, 'means': _means(values)}
    first = arms['grpo']['seeds']
    return {
      'seeds': self.recipe.seeds,
      'arms': arms,
      'from_grpo': {
        arm: _differences(first, arms[arm]['seeds'])
        for arm in ('start', 'permuted', 'sft', 'floor')
      },
    }


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers of an arm that are compared, by name."""
  if 'accuracy' in record:
    levels = {f'level {l}, start': v for l, v in record['start'].items()}
    levels |= {f'level {l}': v for l, v in record['accuracy'].items()}
    return {**levels, 'levels': record['levels'], 'rounds': record['rounds']}
  out = {}
  for kind, one in record['kinds'].items():
    out[f'{kind}, greedy'] = one['greedy']
    out |= {
      f'{kind}, pass@{k}': one['pass'][k]
      for k in ('1', '16')
      if k in one['pass']
    }
  return out


def _means(values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  """Returns mean and 95 % interval over seeds of every number."""
  names = list(dict.fromkeys(n for one in values.values() for n in one))
  return {
    name: comparison.interval(
      [one[name] for one in values.values() if name in one]
    )._asdict()
    for name in names
  }


def _differences(
  first: Mapping[str, Mapping], other: Mapping[str, Mapping]
) -> dict[str, Any]:
  """Returns by how much another arm lies above the first, paired by seed."""
  both = [seed for seed in first if seed in other]
  names = first[both[0]] if both else ()
  return {
    name: comparison.interval(
      [other[seed][name] - first[seed][name] for seed in both]
    )._asdict()
    for name in names
    if all(name in other[seed] for seed in both)
  }


def markdown(results: Mapping[str, Any]) -> str:
  """Returns the results as tables of Markdown."""
  lines = [
    '# Reinforcement and its controls',
    '',
    'Written by `python -m experiments.r1_study`. Shares of held-out problems'
    f' that were solved, over {results["seeds"]} seeds: mean ± 95 % interval of'
    " Student's t; one seed has none. In brackets: every seed.",
    '',
  ]
  for group in (
    ('start', 'grpo', 'permuted', 'sft', 'floor'),
    ('evolve', 'unverified'),
  ):
    lines += [*_table({arm: results['arms'][arm] for arm in group}), '']
  lines += ['Difference from grpo, paired by seed:', '']
  lines += _table(
    {
      arm: {'what': '', 'seeds': {}, 'means': means}
      for arm, means in results['from_grpo'].items()
    }
  )
  return '\n'.join(lines) + '\n'


def _table(arms: Mapping[str, Mapping]) -> list[str]:
  """Returns the lines of a table, an arm a row."""
  names = list(dict.fromkeys(n for arm in arms.values() for n in arm['means']))
  if not names:
    return [f'{", ".join(arms)}: not run.']
  head = ['arm', *names]
  lines = [f'| {" | ".join(head)} |', f'|{"---|" * len(head)}']
  for name, arm in arms.items():
    cells = [_cell(arm, n) if n in arm['means'] else '—' for n in names]
    said = f'{name} ({arm["what"]})' if arm['what'] else name
    lines.append(f'| {" | ".join([said, *cells])} |')
  return lines


def _cell(arm: Mapping[str, Mapping], name: str) -> str:
  """Returns mean and interval of a number, and what it is of every seed."""
  told = str(comparison.Interval(**arm['means'][name]))
  values = [f'{one[name]:.2f}' for one in arm['seeds'].values() if name in one]
  return f'{told} ({", ".join(values)})' if len(values) > 1 else told
