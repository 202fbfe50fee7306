"""Defines verifiers: dataclasses that score an answer to a problem.

A verifier is called with the text and the problem, a mapping that a line of a
task file holds, and returns a number. A wrong answer is a score; what is wrong
with the problem itself, or with the verifier, raises and counts as an error.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

from deepseek_jax.errors import InputError
from deepseek_jax.rl.grading import expression, extract

_SCRIPTS = {
  'en': ('LATIN',),
  'de': ('LATIN',),
  'fr': ('LATIN',),
  'es': ('LATIN',),
  'zh': ('CJK',),
  'ja': ('CJK', 'HIRAGANA', 'KATAKANA'),
  'ko': ('HANGUL',),
  'ru': ('CYRILLIC',),
  'el': ('GREEK',),
  'ar': ('ARABIC',),
}
_ALONE = ('CJK', 'HIRAGANA', 'KATAKANA')  # a character is a word


@dataclasses.dataclass(frozen=True)
class _Placed:
  """Holds what verifiers of an answer share.

  Attributes:
    place: where the answer stands, see `extract.answer`.
  """

  place: str = 'answer'

  def __post_init__(self) -> None:
    """Raises InputError for an unknown place."""
    if self.place not in extract.PLACES:
      raise InputError(
        f'place = {self.place!r}: must be one of {list(extract.PLACES)}'
      )


def _tree(text: str | None) -> tuple | None:
  """Returns the arithmetic in an answer; None if there is none."""
  try:
    return None if text is None else expression.arithmetic(text)
  except expression.ExpressionError:
    return None


def _value(tree: tuple | None) -> Any:
  """Returns the value of an expression; None if it has none."""
  try:
    return None if tree is None else expression.evaluate(tree)
  except expression.ExpressionError:
    return None


@dataclasses.dataclass(frozen=True)
class Arithmetic(_Placed):
  """Compares the value of an expression with 'answer', exactly."""

  needs: ClassVar[tuple[str, ...]] = ('answer',)

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns 1 for the right value, else 0."""
    right = expression.evaluate(expression.arithmetic(str(problem['answer'])))
    return float(_value(_tree(extract.answer(text, self.place))) == right)


@dataclasses.dataclass(frozen=True)
class Countdown(_Placed):
  """Compares an expression with 'target', made of 'numbers', each used once."""

  needs: ClassVar[tuple[str, ...]] = ('numbers', 'target')

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns 1 if numbers and value are right, else 0."""
    said = extract.answer(text, self.place)
    # Some write the equation: its left side is what is asked for.
    said = said and said.partition('=')[0]
    tree = _tree(said)
    if tree is None or 'negative' in expression.operators(tree):
      return 0.0
    given = collections.Counter(Fraction(n) for n in problem['numbers'])
    used = collections.Counter(expression.numbers(tree))
    return float(used == given and _value(tree) == Fraction(problem['target']))


@dataclasses.dataclass(frozen=True)
class Code(_Placed):
  """Runs an expression of the problem's 'arguments' on 'pairs'.

  A pair is [values of the arguments, result]. Ours evaluates the expression,
  which may begin with `return`; Python never does.
  """

  needs: ClassVar[tuple[str, ...]] = ('arguments', 'pairs')

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns 1 if all results are right, else 0."""
    said = extract.answer(text, self.place)
    if said is None or not problem['pairs']:
      return 0.0
    try:
      tree = expression.parse(re.sub(r'^return\b', '', said))
    except expression.ExpressionError:
      return 0.0
    return float(
      all(self._is_right(tree, problem, *p) for p in problem['pairs'])
    )

  def _is_right(
    self, tree: tuple, problem: Mapping, values: list, result: Any
  ) -> bool:
    """Returns whether the expression has this result."""
    names = dict(zip(problem['arguments'], values, strict=True))
    right = result if isinstance(result, bool) else Fraction(str(result))
    try:
      return bool(expression.evaluate(tree, names) == right)
    except expression.ExpressionError:
      return False


@dataclasses.dataclass(frozen=True)
class Exact(_Placed):
  """Compares an answer with 'answer', character by character."""

  needs: ClassVar[tuple[str, ...]] = ('answer',)

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns 1 for the same text, spaces around it left out; else 0."""
    said = extract.answer(text, self.place)
    return float(said == str(problem['answer']).strip())


@dataclasses.dataclass(frozen=True)
class InForm:
  """Looks for <think>...</think> <answer>...</answer> and nothing else.

  Attributes:
    opened: the prompt ends with <think>.
  """

  opened: bool = False
  needs: ClassVar[tuple[str, ...]] = ()

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns 1 if the text has that form, else 0."""
    del problem
    return float(extract.is_in_form(text, opened=self.opened))


@dataclasses.dataclass(frozen=True)
class Language:
  """Measures the share of words in one language, as R1's reward does.

  A word is told by the script of its letters: languages of one script are not
  told apart. In Chinese and Japanese every character is a word.

  Attributes:
    target: a language, as 'en'.
    reasoning: looks at <think>...</think> alone.
    opened: the prompt ends with <think>.
  """

  target: str = 'en'
  reasoning: bool = True
  opened: bool = False
  needs: ClassVar[tuple[str, ...]] = ()

  def __post_init__(self) -> None:
    """Raises InputError for a language whose script is not known."""
    if self.target not in _SCRIPTS:
      raise InputError(
        f'target = {self.target!r}: must be one of {sorted(_SCRIPTS)}'
      )

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns the share, 0 without any word."""
    del problem
    if self.reasoning:
      text = extract.reasoning(text, opened=self.opened) or ''
    scripts = list(map(_script, _words(text)))
    own = sum(script in _SCRIPTS[self.target] for script in scripts)
    return own / len(scripts) if scripts else 0.0


def _script(word: str) -> str:
  """Returns the script that all letters of a word have, '' if they differ."""
  found = {unicodedata.name(c, '?').split()[0].split('-')[0] for c in word}
  return found.pop() if len(found) == 1 else ''


def _words(text: str) -> list[str]:
  """Returns runs of letters; each character of some scripts by itself."""
  out = ['']
  for c in text:
    if not c.isalpha():
      out.append('')
    elif _script(c) in _ALONE:
      out += [c, '']
    elif unicodedata.category(c) != 'Lm':  # modifiers such as ʻ have no script
      out[-1] += c
  return [word for word in out if word]


@dataclasses.dataclass(frozen=True)
class Length:
  """Penalises answers of more than `most` - `soft` tokens, down to -1.

  DAPO's soft penalty (arXiv:2503.14476, eq. 13). The problem's 'tokens' is the
  length, which the caller fills in.
  """

  most: int = 1024
  soft: int = 256
  needs: ClassVar[tuple[str, ...]] = ()

  def __post_init__(self) -> None:
    """Raises InputError for numbers out of range."""
    if not 0 < self.soft <= self.most:
      raise InputError(f'soft = {self.soft}: must lie in 1..most = {self.most}')

  def __call__(self, text: str, problem: Mapping[str, Any]) -> float:
    """Returns the penalty, -1..0."""
    del text
    over = problem['tokens'] - (self.most - self.soft)
    return -min(max(over / self.soft, 0.0), 1.0)
