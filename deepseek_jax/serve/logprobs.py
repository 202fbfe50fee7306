"""Writes log-probabilities as OpenAI's two ways of asking have them.

They are the model's own, before temperature, penalties and masks; those of the
distribution that was drawn from stand beside them under names of our own.
"""

import math
from collections.abc import Sequence
from typing import Any

from deepseek_jax.infer.request import LogProb
from deepseek_jax.serve.served import Served

_LEAST = -9999.0  # OpenAI's "very unlikely"; JSON has no -inf


def plain(value: float) -> float:
  """Returns a log-probability that JSON can hold."""
  return float(value) if math.isfinite(value) else _LEAST


def text_of(data: bytes) -> str:
  """Returns a token's text; a part of a character as U+FFFD."""
  return data.decode('utf-8', 'replace')


def entry(logprob: LogProb, served: Served) -> dict[str, Any]:
  """Returns a token of `choices[].logprobs.content`."""
  return {
    **_named(logprob.token, logprob.logprob, served),
    'sampled_logprob': plain(logprob.sampled),
    'top_logprobs': [_named(t, value, served) for t, value in logprob.top],
  }


def _named(token: int, value: float, served: Served) -> dict[str, Any]:
  """Returns a token's text, bytes and log-probability."""
  data = served.token_bytes(token)
  return {
    'token': text_of(data),
    'logprob': plain(value),
    'bytes': list(data),
  }


class Legacy:
  """Gathers the four parallel lists of /v1/completions."""

  def __init__(self, served: Served):
    """Starts at the beginning of a choice's text."""
    self._served, self._offset = served, 0
    self._decoder = served.tokenizer.decoder()
    self.clear()

  def clear(self) -> None:
    """Drops what was gathered; offsets go on."""
    self.lists: dict[str, list] = {
      'tokens': [],
      'token_logprobs': [],
      'top_logprobs': [],
      'text_offset': [],
      'sampled_token_logprobs': [],
    }

  def add(
    self, token: int, logprob: LogProb | None, *, hidden: bool = False
  ) -> None:
    """Adds a token.

    Args:
      token: its id.
      logprob: of it; None: it is the first, which nothing predicts.
      hidden: it has no part in the text, as one that ends it.
    """
    lists = self.lists
    lists['tokens'].append(self._name(token))
    lists['text_offset'].append(self._offset)
    known = logprob is not None
    value = plain(logprob.logprob) if known else None
    lists['token_logprobs'].append(value)
    drawn = plain(logprob.sampled) if known else None
    lists['sampled_token_logprobs'].append(drawn)
    top = None
    if known:
      # The token itself is always there, so there may be one more than asked.
      top = self._top([*logprob.top, (logprob.token, logprob.logprob)])
    lists['top_logprobs'].append(top)
    if not hidden:
      self._offset += len(self._decoder.feed(token))

  def _top(self, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Returns {text: log-probability}; of equal texts, the likeliest."""
    out: dict[str, float] = {}
    for token, value in pairs:
      name = self._name(token)
      out[name] = max(plain(value), out.get(name, -math.inf))
    return out

  def _name(self, token: int) -> str:
    """Returns a token's text; a part of a character as its bytes."""
    data = self._served.token_bytes(token)
    try:
      return data.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)
