"""Makes problems with known answers: what a tiny model can learn.

Every maker is a function of a random generator that returns a problem, a line
of a task file: 'prompt', what its verifier needs, and 'solution', an answer
that is right, for supervised fine-tuning.
"""

import functools
import itertools
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.rl.grading import adaptors


def addition(rng: random.Random, digits: int = 2, terms: int = 2) -> dict:
  """Returns a sum of numbers of at most `digits` digits: 12+34=."""
  said = '+'.join(str(rng.randrange(10**digits)) for _ in range(terms))
  total = str(sum(map(int, said.split('+'))))
  return {'prompt': f'{said}=', 'answer': total, 'solution': total}


def countdown(
  rng: random.Random, numbers: int = 3, most: int = 20, signs: str = '+-*'
) -> dict:
  """Returns numbers and a target that they reach: 3 5 7=22:.

  The solution groups from the left, as (3*5)+7.
  """
  given = [rng.randint(1, most) for _ in range(numbers)]
  text, value = str(given[0]), Fraction(given[0])
  for n, number in enumerate(given[1:]):
    sign = rng.choice(signs)
    text = f'({text}){sign}{number}' if n else f'{text}{sign}{number}'
    value = {
      '+': value + number,
      '-': value - number,
      '*': value * number,
      '/': value / number,
    }[sign]
  if value.denominator != 1:
    return countdown(rng, numbers, most, signs)
  shown = ' '.join(map(str, sorted(given)))
  return {
    'prompt': f'{shown}={value}:',
    'numbers': given,
    'target': int(value),
    'solution': text,
  }


def linear_code(rng: random.Random, most: int = 9, shown: int = 3) -> dict:
  """Returns pairs of f(x) = a x + b; more are tested than are shown."""
  a, b = rng.randint(0, most), rng.randint(0, most)
  places = rng.sample(range(-most, most + 1), min(shown + 3, 2 * most + 1))
  pairs = [[[x], a * x + b] for x in places]
  said = ' '.join(f'f({x[0]})={y}' for x, y in pairs[:shown])
  return {
    'prompt': f'{said} f(x)=',
    'arguments': ['x'],
    'pairs': pairs,
    'solution': f'{a}*x+{b}',
  }


def sorting(rng: random.Random, most: int = 8, least: int = 5) -> dict:
  """Returns digits to put in order: sort 3142:."""
  digits = [rng.choice('0123456789') for _ in range(rng.randint(least, most))]
  answer = ''.join(sorted(digits))
  return {
    'prompt': f'sort {"".join(digits)}:',
    'answer': answer,
    'solution': answer,
  }


MAKERS: dict[str, Callable] = {
  'addition': addition,
  'countdown': countdown,
  'linear_code': linear_code,
  'sorting': sorting,
}


def problems(recipe: dict[str, Any], where: str) -> list[dict]:
  """Returns `count` different problems of a maker.

  Args:
    recipe: {'maker': 'addition', 'count': 100, 'seed': 0} and the maker's own
      fields; 'reasoning_gym' needs the 'name' of a data set.
    where: names the file in messages.

  Raises:
    InputError: a field is wrong, or there are not so many different problems.
  """
  fields = dict(recipe)
  maker, count = fields.pop('maker', None), fields.pop('count', None)
  seed = fields.pop('seed', 0)
  if type(count) is not int or count < 1 or type(seed) is not int:
    raise InputError(
      f'{where}: count = {count!r} and seed = {seed!r}: must be whole numbers,'
      ' count at least 1'
    )
  if maker != 'reasoning_gym' and maker not in MAKERS:
    known = [*MAKERS, 'reasoning_gym']
    raise InputError(f'{where}: maker = {maker!r}: must be one of {known}')
  try:
    if maker == 'reasoning_gym':
      made = iter(
        adaptors.gym_problems(fields.pop('name'), count, seed, **fields)
      )
    else:
      one = functools.partial(MAKERS[maker], random.Random(seed), **fields)
      made = (one() for _ in itertools.count())
    return _different(made, count, where)
  except (KeyError, TypeError, ValueError, AssertionError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f'{where}: {maker}: {error}') from None


def _different(made: Any, count: int, where: str) -> list[dict]:
  """Returns the first `count` problems with prompts of their own."""
  out: dict[str, dict] = {}
  for problem in itertools.islice(made, 100 * count):
    out.setdefault(problem['prompt'], problem)
    if len(out) == count:
      return list(out.values())
  raise InputError(
    f'{where}: count = {count}: only {len(out)} different problems were found;'
    ' ask for fewer or for larger ones'
  )
