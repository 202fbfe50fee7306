"""Servers for tests, on a free port of this machine."""

import contextlib
import socket
import tempfile
import threading

from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.data.boundaries import Boundaries
from deepseek_jax.infer import formats
from deepseek_jax.infer.format_dialect import FormatDialect
from deepseek_jax.serve.config import Limits, ServeConfig
from deepseek_jax.serve.engine_loop import wait_until_ready
from deepseek_jax.serve.process import Server
from deepseek_jax.serve.served import Served
from tests import tokenizer_folders
from tests.serve.fake_engine import FakeEngine

KEY = 'k' * 32
BYTES = tokenizers.ByteTokenizer()


def deepseek_tokenizer():
  """Returns a tiny tokenizer with the marks of all of DeepSeek's formats."""
  model = tokenizer_folders.byte_level()
  marks = dict.fromkeys(
    mark for form in formats.FORMATS.values() for mark in form.marks
  )
  model.add_special_tokens([*marks])
  return of_folder(
    model,
    names={
      'bos_token': formats.pieces.BOS,
      'eos_token': formats.pieces.EOS,
      'chat_template': None,
    },
  )


def of_folder(model, **files):
  """Returns the tokenizer of a folder, as users have them."""
  with tempfile.TemporaryDirectory() as folder:
    return tokenizers.from_file(tokenizer_folders.save(folder, model, **files))


def served_bytes(**fields):
  """Returns a model of bytes that has no chat format."""
  fields = {'name': 'tiny', 'context': 256, **fields}
  return Served(
    tokenizer=BYTES,
    boundaries=Boundaries((), (), (BYTES.eos_id,)),
    vocab_size=BYTES.vocab_size,
    **fields,
  )


def served_chat(tokenizer, form='v4', **fields):
  """Returns a model that speaks one of DeepSeek's formats."""
  fields = {'name': 'tiny-chat', 'context': 4096, **fields}
  return Served(
    tokenizer=tokenizer,
    boundaries=Boundaries((), (), (tokenizer.eos_id,)),
    vocab_size=tokenizer.vocab_size,
    dialect=FormatDialect(formats.get(form), tokenizer),
    **fields,
  )


@contextlib.contextmanager
def running(
  served, engine=None, *, limits=None, log=None, seconds=20, **config
):
  """Yields (server, engine) that answer; all ends with the block."""
  engine = engine or FakeEngine(
    served.tokenizer, context=served.context, stop=served.stop[0]
  )
  config = ServeConfig(port=0, limits=limits or Limits(), **config)
  server = Server(served, engine, config, log=log or (lambda line: None))
  thread = threading.Thread(target=server.loop.run)
  server.start()
  thread.start()
  try:
    assert wait_until_ready(server.loop, seconds)
    yield server, engine
  finally:
    server.stop()
    server.join()
    thread.join()


def connect(url, buffer=None):
  """Returns a socket that is connected to a server.

  With a small buffer, little is under way to who doesn't read it.
  """
  host, _, port = url.removeprefix('http://').rpartition(':')
  out = socket.socket()
  if buffer is not None:
    out.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
  out.settimeout(20)
  out.connect((host, int(port)))
  return out


def raw(url, text):
  """Returns all that a server answers to some bytes until it closes."""
  with connect(url) as wire:
    wire.sendall(text.encode())
    parts = iter(lambda: wire.recv(1 << 16), b'')
    return b''.join(parts).decode()
