"""Collects conversations that verifiers have passed: rejection sampling."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.posttrain import chain
from deepseek_jax.posttrain.measure import Sampler, ScoredAnswers


def collect(
  path: Path,
  sampler: Sampler,
  variables: Mapping,
  problems: Sequence[Mapping],
  rewards: Sequence[Mapping],
  *,
  drawn: int,
  seed: int,
  verify: bool = True,
) -> dict[str, Any]:
  """Writes answers to problems as conversations; returns counts.

  Of the right answers in the right form to a problem the shortest is kept; of
  several so short, the first drawn.

  Args:
    path: of the file.
    sampler: of the model.
    variables: its weights.
    problems: that are asked.
    rewards: of the task.
    drawn: answers of each problem.
    seed: of the draws.
    verify: False keeps one answer of each problem, whatever it is worth: a
      control.

  Returns:
    Counts; with 0 'kept' the file is empty.
  """
  prompts = [problem['prompt'] for problem in problems]
  groups = sampler.answers(variables, prompts, drawn, seed)
  scored = ScoredAnswers(sampler, groups, problems, rewards)
  rng, kept = random.Random(f'kept {seed}'), []
  for place, prompt in enumerate(prompts):
    good = scored.right[place] & scored.shaped[place] & scored.whole[place]
    choice = [n for n in range(drawn) if good[n]]
    if not verify:
      choice = [rng.randrange(drawn)]
    if choice:
      best = min(choice, key=lambda n: scored.lengths[place, n])
      text = scored.texts[place][best]
      kept.append({'prompt': prompt, 'completion': text})
  kept = [row for row in kept if row['completion']]
  chain.write_lines(path, kept)
  return {
    'asked': len(prompts),
    'drawn': int(scored.right.size),
    'right': int(scored.right.sum()),
    'kept': len(kept),
    'tokens': int(scored.lengths.sum()),
    'verifier_errors': scored.errors,
  }


def check_some(counts: Mapping[str, Any], where: str) -> None:
  """Raises InputError where no answer was kept."""
  if not counts['kept']:
    raise InputError(
      f'{where}: none of {counts["drawn"]} answers to {counts["asked"]}'
      ' problems is right: there is nothing to learn from; choose easier'
      ' problems, or draw more answers'
    )
