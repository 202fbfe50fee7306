"""Makes the text, the problems and the first answers of a small R1.

Text teaches letters, digits and their columns, and sums of one column; it never
holds a problem. Problems are additions with a carry, and countdown: three
numbers and a target. The first answers are a biased teacher's: most of them
forget carries or miss the target, so whoever does better has learnt it from
rewards. Everything follows from a seed.
"""

import itertools
import random
import re
import string
from collections.abc import Callable, Iterator

LONGEST = 6  # digits of the numbers in the text
_LETTERS = string.ascii_lowercase
# What else may be asked of the digits of a column.
_OF_COLUMNS: dict[str, Callable[[str, str], str]] = {
  '#': max,
  '%': min,
  '&': lambda upper, lower: upper,
  '-': lambda upper, lower: str(abs(int(upper) - int(lower))),
  '*': lambda upper, lower: str(2 * int(upper)),
}
_NOUNS = ('cat', 'dog', 'bird', 'tree', 'boat', 'stone', 'lamp', 'house')
_VERBS = ('sees', 'finds', 'likes', 'has', 'wants', 'draws')
_KINDS = ('red', 'small', 'big', 'blue', 'quiet', 'tall')


def answered(thought: str, answer: str) -> str:
  """Returns an answer in R1's form."""
  return f'<think>{thought}</think><answer>{answer}</answer>'


def _digits(rng: random.Random, count: int) -> str:
  """Returns a number of so many digits, the first one not 0."""
  rest = (rng.choice('0123456789') for _ in range(count - 1))
  return rng.choice('123456789') + ''.join(rest)


def columns(left: str, right: str) -> list[str]:
  """Returns the digits of two numbers of one length in pairs, lowest first."""
  return [f'{a}+{b}' for a, b in zip(reversed(left), reversed(right))]


def _sentence(rng: random.Random) -> str:
  """Returns a sentence: the red cat sees a small dog."""
  noun = lambda: f'{rng.choice(_KINDS)} {rng.choice(_NOUNS)}'
  return f'the {noun()} {rng.choice(_VERBS)} a {noun()}.'


def _fact(rng: random.Random) -> str:
  """Returns the sum of a column, with or without a carry: 7+5+1=13."""
  a, b, carry = rng.randrange(10), rng.randrange(10), rng.randrange(2)
  return f'{a}+{b}+1={a + b + 1}' if carry else f'{a}+{b}={a + b}'


def _columns(rng: random.Random) -> str:
  """Returns two numbers and their columns: 123+456: 3+6 2+5 1+4."""
  count = rng.randint(1, LONGEST)
  left, right = _digits(rng, count), _digits(rng, count)
  return f'{left}+{right}: {" ".join(columns(left, right))}'


def _read_off(rng: random.Random) -> str:
  """Returns digits, lowest first, and their number: 2 3 4: 432."""
  number = _digits(rng, rng.randint(1, LONGEST))
  return f'{" ".join(reversed(number))}: {number}'


def _chain(rng: random.Random, most: int = 9) -> str:
  """Returns two steps of adding or subtracting: 8+5=13 13-9=4.

  No step adds two numbers of two digits: such sums are problems.
  """
  return rng.choice(_ways([rng.randint(1, most) for _ in range(3)]))[0]


def _quoted(rng: random.Random) -> str:
  """Returns a number said twice, in the form of answers."""
  number = _digits(rng, rng.randint(1, LONGEST))
  return f'{number}: {answered(" ".join(number), number)}'


_LINES: tuple[tuple[Callable, float], ...] = (
  (_sentence, 1.0),
  (_fact, 2.0),
  (_columns, 3.0),
  (_read_off, 1.5),
  (_chain, 2.5),
  (_quoted, 1.0),
)


def text(seed: int, lines: int) -> str:
  """Returns lines of text; no line asks for a sum of several columns."""
  rng = random.Random(f'text {seed}')
  makers, weights = zip(*_LINES)
  chosen = rng.choices(makers, weights, k=lines)
  return ''.join(f'{make(rng)}\n' for make in chosen)


def _carries(left: str, right: str) -> bool:
  """Returns whether a column but the highest one carries."""
  carry = 0
  pairs = list(zip(reversed(left), reversed(right)))
  for a, b in pairs[:-1]:
    carry = (int(a) + int(b) + carry) // 10
    if carry:
      return True
  return False


def thought_of_sum(left: str, right: str, *, carries: bool) -> tuple[str, str]:
  """Returns the columns of a sum with their results, and what is read off.

  Args:
    left, right: numbers of one length.
    carries: False forgets them.
  """
  said, digits, carry = [], '', 0
  for column in columns(left, right):
    a, b = map(int, column.split('+'))
    total = a + b + carry
    said.append(f'{column}{"+1" * carry}={total}')
    digits = str(total % 10) + digits
    carry = total // 10 if carries else 0
  return ' '.join(said), str(total // 10 or '') + digits


def sums(
  seed: int, digits: int, count: int, *, carry: bool = True
) -> list[dict]:
  """Returns additions of two numbers of so many digits.

  Args:
    seed: of the numbers.
    digits: of each number.
    count: how many; fewer come where there are no more.
    carry: every sum has a carry, but those of one digit.
  """
  rng = random.Random(f'sums {seed} {digits}')
  most = (9 * 10 ** (digits - 1)) ** 2  # pairs there are, some without a carry
  out: dict[str, dict] = {}
  for _ in range(min(50 * count, 20 * most)):
    left, right = _digits(rng, digits), _digits(rng, digits)
    if carry and digits > 1 and not _carries(left, right):
      continue
    prompt = f'{left}+{right}='
    out.setdefault(
      prompt,
      {
        'prompt': prompt,
        'answer': str(int(left) + int(right)),
        'task': 'addition',
        'level': digits,
      },
    )
    if len(out) == count:
      break
  return list(out.values())


def first_sum(problem: dict, rng: random.Random, wrong: float) -> str:
  """Returns the biased teacher's answer to a sum.

  Args:
    problem: one of `sums`.
    rng: decides whether carries are forgotten.
    wrong: how often they are.
  """
  left, right = problem['prompt'].rstrip('=').split('+')
  return answered(*thought_of_sum(left, right, carries=rng.random() >= wrong))


def with_places(row: dict, rng: random.Random) -> dict:
  """Returns a problem, or a conversation, whose digits have letters as places.

  18+35= becomes d1c8 D3C5+, and a thought's 8+5=13 1+3+1=5 becomes c8+C5=13
  d1+D3=05: a column is found by its letter (the index hints of Zhou et al.,
  arXiv:2310.16028), and all columns have one width and are gone through and
  read off alike, whatever the sign says to do.

  Args:
    row: one of `sums` or `other_columns`, or with an answer to one.
    rng: draws the lowest place's letter, so that all of them are met.
  """
  first = rng.randrange(len(_LETTERS) - LONGEST + 1)
  lower = _LETTERS[first : first + LONGEST]
  left, sign, right = re.fullmatch(r'(\d+)(\D)(\d+)=', row['prompt']).groups()

  def told(number: str, letters: str) -> str:
    return ''.join(map(str.__add__, letters[: len(number)][::-1], number))

  prompt = f'{told(left, lower)} {told(right, lower.upper())}{sign}'
  out = row | {'prompt': prompt}
  if 'completion' in row:
    letters = iter(lower)

    def column(found: re.Match) -> str:
      a, b, tens, ones = found.groups()
      letter = next(letters)
      return f'{letter}{a}{sign}{letter.upper()}{b}={tens or 0}{ones}'

    of_column = rf'(\d){re.escape(sign)}(\d)(?:\+1)?=(1?)(\d)'
    out['completion'] = re.sub(of_column, column, row['completion'])
  return out


def other_columns(seed: int, count: int) -> Iterator[dict]:
  """Yields conversations about columns that are not added: 18#35=38.

  They have the form of sums, of up to LONGEST digits: # asks for the larger
  digit of each column, % for the smaller one, & for the upper one, - for how
  far they are apart, * for twice the upper one. Whoever knows them goes through
  columns of any number and has to read the sign at each; nothing is ever
  carried. What is read off are the last digits, and the highest column whole:
  with * it may be longer than the numbers, as a sum may.
  """
  rng = random.Random(f'other columns {seed}')
  for _ in range(count):
    sign, digits = rng.choice([*_OF_COLUMNS]), rng.randint(1, LONGEST)
    left, right = _digits(rng, digits), _digits(rng, digits)
    found = list(map(_OF_COLUMNS[sign], left, right))
    said = [
      f'{a}{sign}{b}={c}'
      for a, b, c in zip(left[::-1], right[::-1], found[::-1])
    ]
    read_off = found[0] + ''.join(result[-1] for result in found[1:])
    whole = answered(' '.join(said), read_off)
    yield {'prompt': f'{left}{sign}{right}=', 'completion': whole}


def _steps(numbers: list[int], signs: tuple[str, str]) -> tuple[str, int, str]:
  """Returns the steps of an expression, its value and itself."""
  a, b, c = numbers
  first = a + b if signs[0] == '+' else a - b
  last = first + c if signs[1] == '+' else first - c
  steps = f'{a}{signs[0]}{b}={first} {first}{signs[1]}{c}={last}'
  return steps, last, f'{a}{signs[0]}{b}{signs[1]}{c}'


def _ways(numbers: list[int]) -> list[tuple[str, int, str]]:
  """Returns every way to join numbers in which no step falls below 0.

  Those that differ in the order of terms alone come once.
  """
  out: dict[tuple, tuple[str, int, str]] = {}
  for order in itertools.permutations(numbers):
    for signs in itertools.product('+-', repeat=2):
      made = _steps(list(order), signs)
      key = (*sorted(zip(('+', *signs), order)),)
      if '=-' not in made[0]:
        out.setdefault(key, made)
  return list(out.values())


def countdowns(seed: int, count: int, most: int = 9) -> list[dict]:
  """Returns problems of three numbers up to `most` and what they reach."""
  rng = random.Random(f'countdowns {seed}')
  out: dict[str, dict] = {}
  for _ in range(50 * count):
    numbers = sorted(rng.randint(1, most) for _ in range(3))
    target = rng.choice(_ways(numbers))[1]
    prompt = f'{" ".join(map(str, numbers))}={target}:'
    out.setdefault(
      prompt,
      {
        'prompt': prompt,
        'numbers': numbers,
        'target': target,
        'task': 'countdown',
        'level': 3,
      },
    )
    if len(out) == count:
      break
  return list(out.values())


def first_countdown(problem: dict, rng: random.Random, wrong: float) -> str:
  """Returns the biased teacher's answer to a countdown.

  Args:
    problem: one of `countdowns`.
    rng: decides whether the target is missed.
    wrong: how often it is.
  """
  ways = _ways(problem['numbers'])
  right = [way for way in ways if way[1] == problem['target']]
  others = [way for way in ways if way[1] != problem['target']]
  miss = others and rng.random() < wrong
  steps, _, whole = rng.choice(others if miss else right)
  return answered(steps, whole)


def first_answers(
  problems: list[dict], seed: int, forget: float, miss: float
) -> Iterator[dict]:
  """Yields problems with the biased teacher's answers, as conversations.

  Args:
    problems: of `sums` and `countdowns`.
    seed: of what is answered wrongly.
    forget: share of sums without carries.
    miss: share of countdowns beside the target.
  """
  rng = random.Random(f'first answers {seed}')
  for problem in problems:
    said = (
      first_sum(problem, rng, forget)
      if problem['task'] == 'addition'
      else first_countdown(problem, rng, miss)
    )
    yield {'prompt': problem['prompt'], 'completion': said}
