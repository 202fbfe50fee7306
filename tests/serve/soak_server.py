"""A server of a tiny model, for the soak: python -m tests.serve.soak_server."""

import jax

import deepseek_jax as ds
from deepseek_jax.data.boundaries import Boundaries
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.serve import grammars
from deepseek_jax.serve.config import Limits, ServeConfig
from deepseek_jax.serve.process import Server
from deepseek_jax.serve.served import Served
from tests import tiny
from tests.serve.served import BYTES

CONTEXT, VOCAB = 128, 272
LIMITS = Limits(body=100_000, requests=150, held=64, seconds=120.0)


def main():
  model = ds.build(ds.changed(tiny.config('step'), {'vocab_size': VOCAB}))
  cfg = EngineConfig(
    slots=32,
    context=CONTEXT,
    page=16,
    pages=200,
    budget=128,
    steps=4,
    queue=400,
    deterministic=True,
  )
  variables = jax.device_put(tiny.draw(model), jax.devices()[0])
  ends = (BYTES.eos_id,)
  served = Served(
    name='tiny',
    tokenizer=BYTES,
    boundaries=Boundaries((), (), ends),
    context=CONTEXT,
    vocab_size=VOCAB,
    grammar=grammars.reader(BYTES, VOCAB, ends),
  )
  engine = Engine(model, variables, cfg, text=BYTES)
  server = Server(served, engine, ServeConfig(port=0, limits=LIMITS))
  print(server.url, flush=True)
  server.run()


if __name__ == '__main__':
  main()
