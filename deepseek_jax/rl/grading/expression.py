"""Parses and evaluates expressions exactly, with bounded work.

Numbers are rationals. A parsed expression is a tuple: ('number', value),
('name', text), (operator, *operands) or ('call', name, *arguments). Text,
depth and numbers have limits, so any text takes little time.
"""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

LONGEST = 4096  # characters
DEEPEST = 64
MOST = 256  # signs of an expression: it is evaluated by recursion
BITS = 4096  # of a numerator or denominator
ARITHMETIC = frozenset({'+', '-', '*', '/', 'negative'})
_TOKEN = re.compile(
  r'\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-z_]\w*)'
  r'|(?P<sign>\*\*|//|==|!=|<=|>=|[-+*/%()<>,]))',
  re.ASCII,
)
# What people and models write for the same signs.
_SAME = str.maketrans({'×': '*', '·': '*', '÷': '/', '−': '-', '–': '-'})
# Binary operators from loose to tight; all but ** group from the left.
_LEVELS = (
  ('or',),
  ('and',),
  ('==', '!=', '<', '<=', '>', '>='),
  ('+', '-'),
  ('*', '/', '//', '%'),
)
_WORDS = frozenset({'or', 'and', 'not', 'if', 'else'})


class ExpressionError(ValueError):
  """Reports a text that is no expression, or one without a value."""


def parse(text: str) -> tuple:
  """Returns the expression of a text; ExpressionError if it is none."""
  if len(text) > LONGEST:
    raise ExpressionError(f'longer than {LONGEST} characters')
  parser = _Parser(_tokens(text.translate(_SAME)))
  tree = parser.choice(0)
  if parser.next() is not None:
    raise ExpressionError(f'{parser.next()!r} follows the expression')
  return tree


def _tokens(text: str) -> list[str]:
  """Returns the tokens of a text."""
  out, at = [], 0
  text = text.rstrip()
  while at < len(text):
    found = _TOKEN.match(text, at)
    if not found:
      raise ExpressionError(
        f'{text[at : at + 8]!r} is no part of an expression'
      )
    out.append(found[0].strip())
    at = found.end()
  if sum(not token[0].isalnum() for token in out) > MOST:
    raise ExpressionError(f'has more than {MOST} signs')
  return out


class _Parser:
  """Reads tokens by recursive descent."""

  def __init__(self, tokens: list[str]):
    """Takes all tokens."""
    self._tokens, self._at = tokens, 0

  def next(self) -> str | None:
    """Returns the next token, None at the end."""
    return self._tokens[self._at] if self._at < len(self._tokens) else None

  def _take(self, wanted: str) -> bool:
    """Skips the next token if it is `wanted`; returns whether it was."""
    taken = self.next() == wanted
    self._at += taken
    return taken

  def _expect(self, wanted: str) -> None:
    """Skips `wanted`; ExpressionError if another token comes."""
    if not self._take(wanted):
      raise ExpressionError(f'{wanted!r} is missing before {self.next()!r}')

  def choice(self, depth: int) -> tuple:
    """Returns `a if c else b`, or what is tighter."""
    if depth > DEEPEST:
      raise ExpressionError(f'nested more than {DEEPEST} deep')
    yes = self._level(0, depth)
    if not self._take('if'):
      return yes
    condition = self._level(0, depth)
    self._expect('else')
    return 'if', condition, yes, self.choice(depth + 1)

  def _level(self, level: int, depth: int) -> tuple:
    """Returns a chain of the operators of a level."""
    if level == len(_LEVELS):
      return self._unary(depth)
    if level == 2 and self._take('not'):
      return 'not', self._level(2, self._deeper(depth))
    left = self._level(level + 1, depth)
    while (sign := self.next()) in _LEVELS[level]:
      self._at += 1
      left = sign, left, self._level(level + 1, depth)
      if level == 2 and self.next() in _LEVELS[2]:
        raise ExpressionError('comparisons can not be chained')
    return left

  def _deeper(self, depth: int) -> int:
    """Returns the depth one further down; ExpressionError past the limit."""
    if depth >= DEEPEST:
      raise ExpressionError(f'nested more than {DEEPEST} deep')
    return depth + 1

  def _unary(self, depth: int) -> tuple:
    """Returns a negated operand, or a power."""
    if self._take('-'):
      return 'negative', self._unary(self._deeper(depth))
    if self._take('+'):
      return self._unary(self._deeper(depth))
    base = self._operand(depth)
    if self._take('**'):
      return '**', base, self._unary(self._deeper(depth))
    return base

  def _operand(self, depth: int) -> tuple:
    """Returns a number, a name, a call or what is in parentheses."""
    token = self.next()
    if token is None:
      raise ExpressionError('ends where a number should stand')
    self._at += 1
    if token == '(':
      inner = self.choice(depth + 1)
      self._expect(')')
      return inner
    if token[0].isdigit():
      if re.match(r'0\d', token):
        raise ExpressionError(f'{token} begins with 0')
      return 'number', _bounded(Fraction(token))
    if not re.match(r'[A-Za-z_]', token) or token in _WORDS:
      raise ExpressionError(f'{token!r} stands where a number should')
    if not self._take('('):
      return 'name', token
    arguments = []
    while not self._take(')'):
      arguments.append(self.choice(depth + 1))
      if self.next() != ')':
        self._expect(',')
    return 'call', token, *arguments


def _bounded(value: Any) -> Any:
  """Returns a value; ExpressionError if it is too large a number."""
  if isinstance(value, bool):
    return value
  value = Fraction(value)
  if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
    raise ExpressionError(f'a number has more than {BITS} bits')
  return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
  """Returns a power; its size is known before it is computed."""
  base, exponent = Fraction(base), Fraction(exponent)
  if exponent.denominator != 1:
    raise ExpressionError('an exponent is no whole number')
  size = max(base.numerator.bit_length(), base.denominator.bit_length())
  if abs(exponent) * max(size, 1) > BITS:
    raise ExpressionError(f'a power has more than {BITS} bits')
  return base ** int(exponent)


_OPERATORS: dict[str, Callable] = {
  '+': lambda a, b: a + b,
  '-': lambda a, b: a - b,
  '*': lambda a, b: a * b,
  '/': lambda a, b: Fraction(a) / b,
  '//': lambda a, b: a // b,
  '%': lambda a, b: a % b,
  '**': _power,
  '==': lambda a, b: a == b,
  '!=': lambda a, b: a != b,
  '<': lambda a, b: a < b,
  '<=': lambda a, b: a <= b,
  '>': lambda a, b: a > b,
  '>=': lambda a, b: a >= b,
  'negative': lambda a: -a,
  'not': lambda a: not a,
}
_FUNCTIONS: dict[str, Callable] = {'abs': abs, 'min': min, 'max': max}


def evaluate(tree: tuple, names: Mapping[str, Any] = {}) -> Any:
  """Returns the value of an expression, a Fraction or a bool.

  Args:
    tree: as `parse` returns it.
    names: values of the names in it.

  Raises:
    ExpressionError: it has none: a division by 0, an unknown name, a number
      beyond the limits.
  """
  kind, *rest = tree
  if kind == 'number':
    return rest[0]
  if kind == 'name':
    if rest[0] not in names:
      raise ExpressionError(f'{rest[0]!r} is not known here')
    return _bounded(names[rest[0]])
  # Only what is needed, as in Python.
  if kind == 'if':
    condition, yes, no = rest
    return evaluate(yes if evaluate(condition, names) else no, names)
  if kind in ('and', 'or'):
    left = evaluate(rest[0], names)
    return evaluate(rest[1], names) if bool(left) == (kind == 'and') else left
  try:
    if kind == 'call':
      name, *arguments = rest
      if name not in _FUNCTIONS:
        raise ExpressionError(f'{name}() is not known here')
      values = [evaluate(a, names) for a in arguments]
      return _bounded(_FUNCTIONS[name](*values))
    return _bounded(_OPERATORS[kind](*(evaluate(a, names) for a in rest)))
  except ZeroDivisionError:
    raise ExpressionError('divides by 0') from None
  except TypeError:
    raise ExpressionError(f'{kind} takes other arguments') from None


def numbers(tree: tuple) -> list[Fraction]:
  """Returns the numbers that stand in an expression, in order."""
  if tree[0] == 'number':
    return [tree[1]]
  inner = [part for part in tree[1:] if isinstance(part, tuple)]
  return [number for part in inner for number in numbers(part)]


def operators(tree: tuple) -> set[str]:
  """Returns the operators in an expression, 'name' and 'call' among them."""
  inner = [part for part in tree[1:] if isinstance(part, tuple)]
  own = set() if tree[0] == 'number' else {tree[0]}
  return own.union(*map(operators, inner))


def arithmetic(text: str) -> tuple:
  """Returns a parsed text; ExpressionError unless it is arithmetic alone."""
  tree = parse(text)
  extra = operators(tree) - ARITHMETIC
  if extra:
    raise ExpressionError(f'{min(extra)!r} is no arithmetic')
  return tree
