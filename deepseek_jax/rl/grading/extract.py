"""Finds the answer, the reasoning and the code in what a model wrote."""

import re

_ANSWER = re.compile(r'<answer>(.*?)</answer>', re.DOTALL)
_TAGS = ('<think>', '</think>', '<answer>', '</answer>')
PLACES = ('answer', 'boxed', 'line', 'all')


def answer(text: str, place: str) -> str | None:
  """Returns the answer in a text without spaces around it, None without one.

  Args:
    text: what a model wrote.
    place: 'answer' is the last <answer>...</answer>, 'boxed' the last
      \\boxed{...}, 'line' the last line that is not blank, 'all' the text.
  """
  if place == 'answer':
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None
  if place == 'boxed':
    return _boxed(text)
  if place == 'line':
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None
  return text.strip()


def _boxed(text: str) -> str | None:
  """Returns what is in the last \\boxed{...} whose braces are balanced."""
  mark = '\\boxed{'
  at = text.rfind(mark)
  while at >= 0:
    depth, start = 1, at + len(mark)
    for end in range(start, len(text)):
      depth += {'{': 1, '}': -1}.get(text[end], 0)
      if not depth:
        return text[start:end].strip()
    at = text.rfind(mark, 0, at)
  return None


def reasoning(text: str, *, opened: bool = False) -> str | None:
  """Returns what is between <think> and </think>; None without both.

  Args:
    text: what a model wrote.
    opened: the prompt ends with <think>.
  """
  text = '<think>' * opened + text
  _, begins, rest = text.partition('<think>')
  inner, ends, _ = rest.partition('</think>')
  return inner if begins and ends else None


def is_in_form(text: str, *, opened: bool = False) -> bool:
  """Returns whether a text is <think>...</think> <answer>...</answer>.

  Each tag stands once, nothing but space stands outside, and neither part is
  empty.
  """
  text = '<think>' * opened + text
  if any(text.count(tag) != 1 for tag in _TAGS):
    return False
  form = r'\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*'
  found = re.fullmatch(form, text, re.DOTALL)
  return bool(found and found[1].strip() and found[2].strip())
