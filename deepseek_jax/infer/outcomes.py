"""Reads what the engine's programs give into the answers that they are for.

All of it is host code.
Legend: R rows, T tokens of a row, L MoE layers, E experts, K chosen ones.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.infer.programs import Decoded, Scores
from deepseek_jax.infer.request import Finish, LogProb
from deepseek_jax.infer.sampler import Drawn
from deepseek_jax.infer.scheduler import Sequence
from deepseek_jax.model.transformer import Model

_UNSOUND = (
  'the model gave logits that are not finite for this request, or its penalties'
  ' and biases made them so'
)


class Taken(NamedTuple):
  """Holds what an answer took of one step; fields as in `Event`."""

  tokens: tuple[int, ...]
  text: str
  logprobs: tuple[LogProb, ...]
  prompt_logprobs: tuple[LogProb | None, ...]
  finish: Finish | None
  error: str | None
  kept: np.ndarray | None


def take(one: Sequence, row: int, out: Decoded, model: Model) -> Taken:
  """Appends the tokens that a row has drawn to its sequence.

  The sound ones before one that isn't are taken, too.

  Args:
    one: changed.
    row: its row of `out`.
    out: on the host.
    model: of the engine.
  """
  count, drawn = int(out.count[row]), out.drawn
  sound, start = drawn.sound[row, :count], one.cached
  fine = count if sound.all() else int(sound.argmin())
  tokens, text, finish, error = [], '', None, None
  for token in map(int, drawn.token[row, :fine]):
    tokens.append(token)
    one.buffer[one.length] = token
    one.length += 1
    one.cached += 1
    more, finish, error = _read(one, token)
    text += more
    if finish:
      break
  if not finish and fine < count:
    finish, error = 'error', _UNSOUND
    text += one.text.finish().text if one.text is not None else ''
  if out.experts is not None:
    chosen = out.experts[row, : len(tokens)]
    one.experts = _counted(one.experts, chosen, model)
    route(one, start, chosen, model)
  logprobs = ()
  if one.request.logprobs is not None:
    logprobs = _logprobs(drawn, row, len(tokens), one.request.logprobs)
  kept = drawn.kept[row, : len(tokens)] if one.request.kept else None
  scores, one.scores = tuple(one.scores), []
  return Taken(tuple(tokens), text, logprobs, scores, finish, error, kept)


def route(one: Sequence, start: int, chosen: np.ndarray, model: Model) -> None:
  """Notes the experts of a sequence's tokens, if its request asks for them.

  What is computed again, as pages were taken, keeps those that it was first
  sampled with.

  Args:
    one: changed.
    start: position of the first token.
    chosen: [T L K].
    model: of the engine.
  """
  if not one.request.routes:
    return
  if one.routes is None:
    shape = len(one.buffer), *chosen.shape[1:]
    small = _experts_of(model) <= 2**15
    one.routes = np.full(shape, -1, np.int16 if small else np.int32)
  span = one.routes[start : start + len(chosen)]
  span[:] = np.where(span < 0, chosen, span)


def _experts_of(model: Model) -> int:
  """Returns E, of the layer that has most."""
  layers = [layer.block.ffn for layer in model.config.in_order()]
  return max(f.experts for f in layers if hasattr(f, 'experts'))


def _read(one: Sequence, token: int) -> tuple[str, Finish | None, str | None]:
  """Returns the text that is certain with a token, and whether it ends."""
  text, finish, error = '', None, None
  stops = token in one.request.sampling.stop
  if one.matcher is not None:
    try:
      stops |= not one.matcher.accept(token)
      stops |= one.matcher.ended
    except InputError as wrong:
      finish, error = 'error', str(wrong)
  if one.text is not None and not stops:
    text = one.text.feed(token).text
    stops = one.text.stopped
  if not error and stops:
    finish = 'stop'
  elif not error and one.left <= 0:
    finish = 'length'
  if finish and one.text is not None:
    text += one.text.finish().text
  return text, finish, error


def _counted(
  total: np.ndarray | None, chosen: np.ndarray, model: Model
) -> np.ndarray:
  """Returns counts [L E] with what some tokens chose, [T L K]."""
  if total is None:
    total = np.zeros((chosen.shape[1], _experts_of(model)), np.int64)
  number = np.arange(chosen.shape[1])[:, None]
  np.add.at(total, (np.broadcast_to(number, chosen.shape), chosen), 1)
  return total


def _logprobs(
  drawn: Drawn, row: int, count: int, wanted: int
) -> tuple[LogProb, ...]:
  """Returns the log-probabilities of the first tokens of a row."""
  out = []
  for step in range(count):
    top = zip(drawn.top[row, step, :wanted], drawn.top_logprob[row, step])
    out.append(
      LogProb(
        int(drawn.token[row, step]),
        float(drawn.logprob[row, step]),
        float(drawn.sampled[row, step]),
        tuple((int(a), float(b)) for a, b in top),
      )
    )
  return tuple(out)


def score(one: Sequence, row: int, count: int, scores: Scores) -> None:
  """Notes the log-probabilities of the prompt's tokens in a chunk.

  Args:
    one: before the chunk's tokens count as cached.
    row: its row of the scores.
    count: tokens of the chunk.
    scores: on the host.
  """
  # What is computed again, as pages were taken or weights changed, counts.
  del one.scores[one.cached + 1 :]
  wanted = one.request.logprobs or 0
  for t in range(count):
    token = int(one.buffer[one.cached + t + 1])
    logprob = float(scores.logprob[row, t])
    top = zip(scores.top[row, t, :wanted], scores.top_logprob[row, t])
    top = tuple((int(a), float(b)) for a, b in top)
    one.scores.append(LogProb(token, logprob, logprob, top))
