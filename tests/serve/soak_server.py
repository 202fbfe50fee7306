"""A server of a tiny model that chats, for the soak.

python -m tests.serve.soak_server
"""

import jax

import deepseek_jax as ds
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.serve import grammars
from deepseek_jax.serve.config import Limits, ServeConfig
from deepseek_jax.serve.process import Server
from tests import tiny
from tests.serve import served as servers

CONTEXT = 128
LIMITS = Limits(body=100_000, requests=150, held=64, seconds=120.0)


def main():
  tokenizer = servers.deepseek_tokenizer()
  vocab = tokenizer.vocab_size
  model = ds.build(ds.changed(tiny.config('step'), {'vocab_size': vocab}))
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
  served = servers.served_chat(
    tokenizer,
    'v3',  # its prompts are short
    context=CONTEXT,
    grammar=grammars.reader(tokenizer, vocab, (tokenizer.eos_id,)),
  )
  engine = Engine(model, variables, cfg, text=tokenizer)
  server = Server(served, engine, ServeConfig(port=0, limits=LIMITS))
  print(server.url, flush=True)
  server.run()


if __name__ == '__main__':
  main()
