"""Samples from a finished run, a Hugging Face folder or a converted store.

python -m experiments.sample --workdir=runs/demo --prompt='def main('
python -m experiments.sample --hf=DIR --chat
python -m experiments.sample --workdir=runs/demo --prompt='x = ' --after='+ 1'
"""

import os
from typing import NamedTuple

import jax
from absl import flags

import deepseek_jax as ds
from deepseek_jax import hf, loop, sample
from deepseek_jax.errors import InputError
from deepseek_jax.hf import chat
from experiments import common

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run.')
_HF = flags.DEFINE_string('hf', None, 'Hugging Face folder, or one converted.')
_PROMPT = flags.DEFINE_multi_string(
  'prompt', [], 'Text to go on from; may be given several times.'
)
_AFTER = flags.DEFINE_string(
  'after', None, 'Text behind the hole: the model fills in the middle.'
)
_CHAT = flags.DEFINE_bool('chat', False, 'Hold a conversation (with --hf).')
_NEW = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens at most.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.7, '0: the likeliest.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw among so many tokens; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 0.95, 'Draw among this much probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the draws.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'What to compute in (--hf).'
)


class _Source(NamedTuple):
  model: ds.Model
  variables: dict
  tokenizer: object
  folder: str


def _load() -> _Source:
  if bool(_WORKDIR.value) == bool(_HF.value):
    raise InputError('give either --workdir=RUN or --hf=FOLDER')
  if _WORKDIR.value:
    run = loop.load(_WORKDIR.value)
    return _Source(run.model, run.variables, run.tokenizer, _WORKDIR.value)
  folder = _HF.value
  if not os.path.isdir(folder):
    raise InputError(f'--hf={folder}: no such folder')
  if os.path.exists(os.path.join(folder, hf.store.MODEL)):
    config, variables = hf.restore(folder)
  else:
    config, variables = hf.load(folder)
  config = ds.changed(config, {'compute.dtype': _DTYPE.value})
  from deepseek_jax.data import from_file

  tokenizer = from_file(os.path.join(folder, 'tokenizer.json'))
  return _Source(ds.build(config), variables, tokenizer, folder)


def _prompts(tokenizer) -> list[list[int]]:
  if _AFTER.value is None:
    return [
      tokenizer.encode(p, special=True) or [tokenizer.eos_id]
      for p in _PROMPT.value
    ]
  if not tokenizer.fim:
    raise InputError('--after: this tokenizer has no fill-in-the-middle marks')
  marks, after = tokenizer.fim, tokenizer.encode(_AFTER.value)
  return [
    [marks.begin, *tokenizer.encode(p), marks.hole, *after, marks.end]
    for p in _PROMPT.value
  ]


def _settings(tokenizer) -> sample.SampleConfig:
  return sample.SampleConfig(
    _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, (tokenizer.eos_id,)
  )


def _stream(source, prompt, key):
  drawn = sample.stream(
    source.model,
    source.variables,
    [prompt],
    _settings(source.tokenizer),
    max_new_tokens=_NEW.value,
    key=key,
  )
  for tokens in drawn:
    if tokens[0] == source.tokenizer.eos_id:
      return
    yield int(tokens[0])


def _converse(source):
  key = iter(jax.random.split(jax.random.key(_SEED.value), 1 << 16))
  chat.converse(
    lambda ids: _stream(source, ids, next(key)),
    source.tokenizer,
    chat.template_config(source.folder),
  )


def _check_flags():
  """What is wrong in any case is told before a model is read."""
  sample.SampleConfig(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  if _NEW.value < 1:
    raise InputError(f'--max_new_tokens={_NEW.value}: must be at least 1')
  if not -(2**63) <= _SEED.value < 2**63:
    raise InputError(f'--seed={_SEED.value}: must fit in 64 bits')
  if not _CHAT.value and not _PROMPT.value:
    raise InputError("give a --prompt='...', or --chat with --hf")
  texts = [('prompt', text) for text in _PROMPT.value]
  for name, text in [*texts, ('after', _AFTER.value or '')]:
    try:
      text.encode()
    except UnicodeEncodeError as error:
      # The shell's bytes that are no UTF-8 come as lone surrogates.
      raise InputError(
        f'--{name}={text!r}: character {error.start} is not UTF-8; give text'
        ' in UTF-8'
      ) from None


def main(argv):
  del argv
  _check_flags()
  source = _load()
  source = source._replace(
    variables=sample.prepare(source.model, source.variables)
  )
  if _CHAT.value:
    _converse(source)
    return
  key = jax.random.key(_SEED.value)
  for text, prompt in zip(_PROMPT.value, _prompts(source.tokenizer)):
    pieces = chat.decode_stream(source.tokenizer, _stream(source, prompt, key))
    first = next(pieces, '')  # what is wrong is told before the prompt
    print(text, end=first, flush=True)
    for piece in pieces:
      print(piece, end='', flush=True)
    print('' if _AFTER.value is None else _AFTER.value)


if __name__ == '__main__':
  common.launch(main)
