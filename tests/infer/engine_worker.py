"""The engine on a mesh of devices, against one device.

python -m tests.infer.engine_worker NAME: largest differences by mesh.
"""

import json
import sys

import numpy as np

from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.parallel import sharding
from tests import tiny
from tests.infer import families
from tests.parallel.context_worker import mesh_of

RULES = {
  'batch': ('data', 'expert'),
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'experts': 'expert',
}
CFG = EngineConfig(
  slots=4, context=64, page=8, budget=16, steps=3, rows=(4,), contexts=(64,)
)


def answers(name: str):
  """Answers of a family's engine, and counts of its pages."""
  rng = np.random.default_rng(0)
  asked = []
  for i in range(5):
    prompt = tuple(map(int, rng.integers(1, tiny.VOCAB, rng.integers(1, 30))))
    asked.append(Request(prompt, 10, Sampling(seed=i), logprobs=0))
  run = Engine(families.model(name), families.variables(name), CFG)
  return [a for (a,) in run.run(asked)], run.stats


def main(name: str) -> dict:
  one, _ = answers(name)
  found = {}
  for axes in ({'data': 2}, {'tensor': 2}, {'expert': 2, 'tensor': 2}):
    mesh = mesh_of(**({'data': 1, 'expert': 1, 'tensor': 1} | axes))
    with sharding.use(mesh, RULES):
      many, stats = answers(name)
    same = [a.tokens for a in one] == [a.tokens for a in many]
    logs = lambda some: np.array(
      [[p.logprob for p in a.logprobs] for a in some]
    )
    error = float(np.abs(logs(one) - logs(many)).max()) if same else None
    free = stats['pages'] - stats['pages_free']
    found[' '.join(f'{k}{v}' for k, v in axes.items())] = [same, error, free]
  return found


if __name__ == '__main__':
  print(json.dumps(main(*sys.argv[1:])))
