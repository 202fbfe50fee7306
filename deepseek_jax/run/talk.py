"""Holds conversations with a model, in the format of its folder."""

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from deepseek_jax.data import boundaries, from_file
from deepseek_jax.errors import InputError, told
from deepseek_jax.hf import load
from deepseek_jax.hf.source import absent
from deepseek_jax.infer import chat, format_dialect
from deepseek_jax.infer.engine import Engine
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.transformer import build


def answers(
  engine: Engine, sampling: Sampling, new_tokens: int, seed: int
) -> Callable[[Sequence[int]], Iterator[int]]:
  """Returns ids of a conversation -> ids of its next answer, one at a time.

  Args:
    engine: keeps what is cached from turn to turn.
    sampling: how tokens are drawn; its seed is not read.
    new_tokens: of an answer, at most.
    seed: of the first answer; each later one has the next.
  """
  turns = itertools.count()

  def answer(ids: Sequence[int]) -> Iterator[int]:
    own = dataclasses.replace(sampling, seed=seed + next(turns))
    for event in engine.stream(Request(tuple(ids), new_tokens, own)):
      if event.error:
        raise InputError(event.error)
      yield from event.tokens

  return answer


def talk(
  folder: str | os.PathLike,
  questions: Sequence[str] = (),
  *,
  temperature: float = 0.0,
  max_new_tokens: int = 128,
  context: int = 1024,
  seed: int = 0,
  system: str | None = None,
) -> list[dict[str, str]]:
  """Holds a conversation with the model of a Hugging Face folder; prints it.

  Args:
    folder: with the weights, a tokenizer, and a chat template or the marks of
      one of DeepSeek's formats.
    questions: what the user says, in turn; without any the terminal is asked.
    temperature: 0 takes the likeliest tokens.
    max_new_tokens: of an answer.
    context: tokens of the whole conversation, at most.
    seed: of the draws.
    system: a first system message.

  Returns:
    The messages.

  Raises:
    InputError: the folder has no chat format or is not understood.
  """
  if not isinstance(folder, str | os.PathLike):
    raise InputError(f'folder: is {told(folder)}; give a Hugging Face folder')
  folder = os.path.expanduser(os.fspath(folder))
  texts = isinstance(questions, Sequence) and not isinstance(questions, str)
  if not texts or not all(isinstance(said, str) for said in questions):
    raise InputError(
      f"questions: is {told(questions)}; give a list of texts, as in ['Hi']"
    )
  if not os.path.isdir(folder):
    raise InputError(f'folder = {folder!r}: {absent(folder)}')
  tokenizer = from_file(folder)
  dialect = format_dialect.known(
    format_dialect.choose('auto', folder, tokenizer, published=True), folder
  )
  model_config, variables = load(folder)
  ends = boundaries.boundaries(folder, tokenizer).ends
  held = EngineConfig(slots=1, context=context, steps=4, contexts=(context,))
  engine = Engine(build(model_config), variables, held)
  sampling = Sampling(temperature=temperature, stop=tuple(ends))
  more = {}
  if questions:
    more['ask'] = _asking(questions)
  return chat.converse(
    answers(engine, sampling, max_new_tokens, seed),
    dialect,
    ends=ends,
    system=system,
    context=engine.context,
    note=lambda line: print(line, file=sys.stderr),
    **more,
  )


def _asking(questions: Sequence[str]) -> Callable[[], str]:
  """Returns what gives and prints one question after the other, then ends."""
  left = iter(questions)

  def ask() -> str:
    for said in left:
      print(f'> {said}')
      return said
    raise EOFError

  return ask
