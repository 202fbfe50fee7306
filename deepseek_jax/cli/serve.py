"""Serves a model over HTTP, as OpenAI's API, with a page to chat on.

python -m experiments.serve --workdir=runs/demo
python -m experiments.serve --hf=DIR --port=8080 --context=8192 --slots=8
python -m experiments.serve --hf=DIR --host=0.0.0.0 --api_key_file=keys

Listens on 127.0.0.1; another --host needs a key, from the file or from the
environment (DEEPSEEK_JAX_API_KEY). Needs the extra 'serve'; with the extra
'grammar' answers can be made to fit a JSON schema.
"""

import dataclasses
import os
import re
from pathlib import Path

from absl import flags

from deepseek_jax import say
from deepseek_jax.cli import common, experiment_file, extras
from deepseek_jax.cli.opened import Opened, choose_dialect, load
from deepseek_jax.errors import InputError
from deepseek_jax.infer.engine import Engine, EngineConfig

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a run.')
_CONFIG = experiment_file.define_flag()
flags.declare_key_flag('config')
_HF = flags.DEFINE_string('hf', None, 'Hugging Face folder, or one converted.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'What to compute in (--hf).'
)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
_PORT = flags.DEFINE_integer('port', 8000, 'Port; 0: a free one.')
_KEYS = flags.DEFINE_string(
  'api_key_file', None, 'File with the keys that open the server, one a line.'
)
_HOSTS = flags.DEFINE_multi_string(
  'allow_host', [], 'More names that browsers may call an open server by.'
)
_ORIGINS = flags.DEFINE_multi_string(
  'allow_origin', [], 'Page of another server that may ask: https://host:port.'
)
_NAME = flags.DEFINE_string(
  'name', None, 'What requests call the model; None: as its folder.'
)
_FORMAT = flags.DEFINE_string(
  'chat_format',
  'auto',
  'auto (as the run was trained, or the folder tells), none, template, or one'
  ' of v3, r1, v32, v4, v41.',
)
_CONTEXT = flags.DEFINE_integer(
  'context', 2048, 'Tokens of a prompt and its answer together.'
)
_SLOTS = flags.DEFINE_integer('slots', 8, 'Answers that are made together.')
_PAGES = flags.DEFINE_integer(
  'pages', None, 'Pages of the cache; None: as many as all slots can fill.'
)
_BUDGET = flags.DEFINE_integer('budget', 256, 'Tokens of a prefill step.')
_CHUNKS = flags.DEFINE_list(
  'chunks',
  [],
  'Shapes of prefill in place of those of --budget: rows x tokens, 1x64,4x128.'
  ' More of them leave less padding and take longer to compile.',
)
_STEPS = flags.DEFINE_integer('steps', 8, 'Tokens that a call draws a row.')
_DRAFTS = flags.DEFINE_integer(
  'drafts', 0, 'Tokens that the MTP blocks guess ahead of each call; 0: none.'
)
_DRAFT_ROWS = flags.DEFINE_integer(
  'draft_rows', None, 'Answers at once up to which they guess; None: any.'
)
_DETERMINISTIC = flags.DEFINE_bool(
  'deterministic', False, 'One shape for all: no answer depends on others.'
)
_REQUESTS = flags.DEFINE_integer(
  'max_requests', 256, 'Requests under way at a time; more are told to wait.'
)
_NEW = flags.DEFINE_integer('max_new_tokens', 32_768, 'Most that one may ask.')
_SECONDS = flags.DEFINE_float(
  'max_seconds', 600.0, 'For one request; 0: no limit.'
)
_LOG = flags.DEFINE_bool('log', True, 'A line for each answer, without text.')

_NEEDED = {
  'starlette': 'starlette',
  'uvicorn': 'uvicorn',
  'prometheus_client': 'prometheus-client',
}


def _chunks() -> tuple[tuple[int, int], ...] | None:
  """Returns --chunks as an EngineConfig has them; None without.

  Raises:
    InputError: one is not rows and tokens.
  """
  pairs = [re.fullmatch(r'(\d+)x(\d+)', chunk) for chunk in _CHUNKS.value]
  if not all(pairs):
    raise InputError(
      f'--chunks={",".join(_CHUNKS.value)}: each must be rows x tokens, as 1x64'
    )
  return tuple((int(p[1]), int(p[2])) for p in pairs) or None


def _engine_config() -> EngineConfig:
  """Returns the shapes of the flags; routing is the model's."""
  return EngineConfig(
    slots=_SLOTS.value,
    context=_CONTEXT.value,
    pages=_PAGES.value,
    budget=_BUDGET.value,
    steps=_STEPS.value,
    queue=_REQUESTS.value,
    deterministic=_DETERMINISTIC.value,
    chunks=_chunks(),
    drafts=_DRAFTS.value,
    draft_rows=_DRAFT_ROWS.value,
  )


def _engine(source: Opened, shapes: EngineConfig) -> Engine:
  """Returns the engine of what was loaded."""
  routed = any(b.block.routed for b in source.model.config.in_order())
  return Engine(
    source.model,
    source.variables,
    dataclasses.replace(shapes, routing=routed),
    text=source.tokenizer,
    donate=True,  # the server needs them for nothing else
  )


def main(argv: list[str]) -> None:
  """Serves until it is told to end."""
  del argv
  extras.check('serve', _NEEDED)
  from deepseek_jax.serve import config as configs
  from deepseek_jax.serve import grammars, process
  from deepseek_jax.serve.served import Served, fingerprint

  config = configs.ServeConfig(
    host=_HOST.value,
    port=_PORT.value,
    keys=configs.read_keys(_KEYS.value),
    hosts=tuple(name.lower() for name in _HOSTS.value),
    origins=tuple(_ORIGINS.value),
    limits=configs.Limits(
      new_tokens=_NEW.value, requests=_REQUESTS.value, seconds=_SECONDS.value
    ),
  )
  shapes = _engine_config()
  experiment_file.load_flag(_CONFIG)
  source = load(_WORKDIR.value, _HF.value, _DTYPE.value)
  for note in source.boundaries.notes:
    say.warn(note)
  vocab = source.model.config.vocab_size
  dialect = choose_dialect(_FORMAT.value, source, published=bool(_HF.value))
  served = Served(
    name=_NAME.value or Path(os.path.abspath(source.folder)).name,
    tokenizer=source.tokenizer,
    boundaries=source.boundaries,
    context=_CONTEXT.value,
    vocab_size=vocab,
    dialect=dialect,
    grammar=grammars.reader(source.tokenizer, vocab, source.boundaries.ends),
    fingerprint=fingerprint(source.variables),
  )
  server = process.Server(
    served,
    _engine(source, shapes),
    config,
    log=say.warn if _LOG.value else lambda line: None,
  )
  form = dialect.name if dialect else 'none: completions only'
  print(f'{served.name}: {server.url} (chat format {form})', flush=True)
  server.run(say.warn)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
