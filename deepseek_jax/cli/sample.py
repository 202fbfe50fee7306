"""Samples from a finished run, a Hugging Face folder or a converted store.

python -m experiments.sample --workdir=runs/demo --prompt='def main('
python -m experiments.sample --hf=DIR --chat
python -m experiments.sample --workdir=runs/sft --chat
python -m experiments.sample --workdir=runs/demo --prompt='x = ' --after='+ 1'
python -m experiments.sample --workdir=runs/demo --prompt='a=' --prompt='b=' \\
  --stop='#'
"""

import itertools
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags

import deepseek_jax as ds
from deepseek_jax.cli import common, experiment_file
from deepseek_jax.cli.opened import Opened, choose_dialect, load
from deepseek_jax.data import boundaries
from deepseek_jax.errors import InputError
from deepseek_jax.infer import chat, format_dialect
from deepseek_jax.infer import sampling as sample
from deepseek_jax.infer.text import decode_stream
from deepseek_jax.run.talk import answers

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run.')
_CONFIG = experiment_file.define_flag()
flags.declare_key_flag('config')
_HF = flags.DEFINE_string('hf', None, 'Hugging Face folder, or one converted.')
_PROMPT = flags.DEFINE_multi_string(
  'prompt', [], 'Text to go on from; several are drawn as one batch.'
)
_AFTER = flags.DEFINE_string(
  'after', None, 'Text behind the hole: the model fills in the middle.'
)
_STOP = flags.DEFINE_multi_string(
  'stop', [], 'Text to end before; may be given several times.'
)
_BOS = flags.DEFINE_enum(
  'bos',
  'folder',
  ['folder', 'yes', 'no'],
  'Token of the beginning before a prompt; folder: as its files say.',
)
_CHAT = flags.DEFINE_bool('chat', False, 'Hold a conversation.')
_NEW = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens at most.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.7, '0: the likeliest.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw among so many tokens; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 0.95, 'Draw among this much probability.')
_CONTEXT = flags.DEFINE_integer(
  'context', 2048, 'Tokens of a conversation at most (--chat).'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the draws.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'What to compute in (--hf).'
)


def _wanted(source: Opened) -> boundaries.Boundaries:
  """Returns what begins and ends the texts, by the folder and --bos."""
  around, bos = source.boundaries, source.tokenizer.bos_id
  if _CHAT.value:  # the template writes what begins a text
    return around
  if _BOS.value == 'no':
    return around._replace(begins=())
  if _BOS.value == 'folder':
    for note in around.notes:
      print(f'{note}; see --bos', file=sys.stderr)
    return around
  if bos is None:
    raise InputError('--bos=yes: tokenizer_config.json names no bos_token')
  return around._replace(begins=around.begins or (bos,))


def _prompts(source: Opened) -> list[list[int]]:
  """Returns the token ids of every prompt, those of --after infilled."""
  tokenizer, around = source.tokenizer, source.boundaries.around
  if _AFTER.value is None:
    return [
      around(tokenizer.encode(p, special=True)) or [tokenizer.eos_id]
      for p in _PROMPT.value
    ]
  if not tokenizer.fim:
    raise InputError('--after: this tokenizer has no fill-in-the-middle marks')
  marks, after = tokenizer.fim, tokenizer.encode(_AFTER.value)
  return [
    around([marks.begin, *tokenizer.encode(p), marks.hole, *after, marks.end])
    for p in _PROMPT.value
  ]


def _settings(source: Opened) -> sample.SampleConfig:
  """Returns how tokens are drawn.

  A stop text that is one token ends a row as the end of a text does.
  """
  encoded = [source.tokenizer.encode(s, special=True) for s in _STOP.value]
  single = [ids[0] for ids in encoded if len(ids) == 1]
  stop = (*source.boundaries.ends, *single)
  return sample.SampleConfig(
    _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, stop
  )


def _drawn(
  source: Opened, prompts: Sequence[list[int]], key: jax.Array
) -> Iterator[list[int | None]]:
  """Yields the next token of every prompt; None where its text has ended."""
  cfg = _settings(source)
  steps = sample.stream(
    source.model,
    source.variables,
    prompts,
    cfg,
    max_new_tokens=_NEW.value,
    key=key,
  )
  ended = np.zeros(len(prompts), bool)
  for tokens in steps:
    ended |= np.isin(tokens, cfg.stop)
    yield [None if end else int(t) for t, end in zip(tokens, ended)]


def _stream(source: Opened, prompt: list[int], key: jax.Array) -> Iterator[int]:
  """Returns the tokens that follow one prompt, until its text ends."""
  return itertools.takewhile(
    lambda token: token is not None,
    (tokens[0] for tokens in _drawn(source, [prompt], key)),
  )


def _texts(
  source: Opened, prompts: Sequence[list[int]], key: jax.Array
) -> list[str]:
  """Returns what follows several prompts, drawn as one batch."""
  decoders = [source.tokenizer.decoder(prompt) for prompt in prompts]
  texts = ['' for _ in prompts]
  going = set(range(len(prompts)))
  for tokens in _drawn(source, prompts, key):
    # A row leaves when its text has ended or holds a text of --stop.
    for i in sorted(going):
      if tokens[i] is None:
        going.remove(i)
        continue
      texts[i] += decoders[i].feed(tokens[i])
      going -= {i} if any(s in texts[i] for s in _STOP.value) else set()
    if not going:
      break
  texts = [text + decoder.finish() for text, decoder in zip(texts, decoders)]
  return [''.join(chat.until([text], _STOP.value)) for text in texts]


def _converse(source: Opened) -> None:
  """Runs a chat on the terminal; a turn goes on from what is cached."""
  found = choose_dialect('auto', source, published=bool(_HF.value))
  dialect = format_dialect.known(found, source.folder)
  context = _CONTEXT.value
  cfg = ds.EngineConfig(slots=1, context=context, steps=4, contexts=(context,))
  engine = ds.Engine(source.model, source.variables, cfg)
  say = lambda line: print(f'\033[2m{line}\033[0m', file=sys.stderr)
  engine.warm_up(say)
  sampling = ds.Sampling(
    _TEMPERATURE.value,
    _TOP_K.value,
    _TOP_P.value,
    stop=tuple(source.boundaries.ends),
  )
  say('/help lists commands')
  chat.converse(
    answers(engine, sampling, _NEW.value, _SEED.value),
    dialect,
    ends=source.boundaries.ends,
    context=engine.context,
    note=say,
  )


def _check_flags() -> None:
  """Raises InputError for wrong flags before a model is read."""
  sample.SampleConfig(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  if _NEW.value < 1:
    raise InputError(f'--max_new_tokens={_NEW.value}: must be at least 1')
  if not -(2**63) <= _SEED.value < 2**63:
    raise InputError(f'--seed={_SEED.value}: must fit in 64 bits')
  if _CONTEXT.value < 2:
    raise InputError(f'--context={_CONTEXT.value}: must be at least 2')
  if not _CHAT.value and not _PROMPT.value:
    raise InputError("give a --prompt='...', or --chat")
  if _CHAT.value and _STOP.value:
    raise InputError('--stop: ends texts of --prompt; leave it out with --chat')
  if '' in _STOP.value:
    raise InputError("--stop='': name the text to end before")
  texts = [('prompt', text) for text in _PROMPT.value]
  texts += [('stop', text) for text in _STOP.value]
  for name, text in [*texts, ('after', _AFTER.value or '')]:
    try:
      text.encode()
    except UnicodeEncodeError as error:
      # Bytes of the shell that are not UTF-8 arrive as lone surrogates.
      raise InputError(
        f'--{name}={text!r}: character {error.start} is not UTF-8; give text'
        ' in UTF-8'
      ) from None


def main(argv: list[str]) -> None:
  """Prints what follows the prompts, or runs a chat."""
  del argv
  _check_flags()
  experiment_file.load_flag(_CONFIG)
  source = load(_WORKDIR.value, _HF.value, _DTYPE.value)
  source = source._replace(
    variables=sample.prepare(source.model, source.variables, donate=True),
    boundaries=_wanted(source),
  )
  if _CHAT.value:
    _converse(source)
    return
  key = jax.random.key(_SEED.value)
  prompts = _prompts(source)
  after = '' if _AFTER.value is None else _AFTER.value
  if len(prompts) > 1:
    drawn = _texts(source, prompts, key)
    for prompt, text in zip(_PROMPT.value, drawn):
      print(f'{prompt}{text}{after}')
    return
  pieces = decode_stream(
    source.tokenizer, _stream(source, prompts[0], key), prompts[0]
  )
  pieces = chat.until(pieces, _STOP.value)
  first = next(pieces, '')  # errors come before the prompt is printed
  print(_PROMPT.value[0], end=first, flush=True)
  for piece in pieces:
    print(piece, end='', flush=True)
  print(after)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
