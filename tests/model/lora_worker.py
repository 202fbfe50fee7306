"""Adapters on a mesh and through a pipeline against one device.

python -m tests.model.lora_worker MODEL AXIS...
"""

import dataclasses
import json
import sys

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax.run.staged_steps import StagedSteps
from deepseek_jax.run.steps import Steps
from tests import tiny
from tests.run.staged_worker import RECIPE, T, gap, run


def begun(model: ds.Model, fresh):
  """A state like a fresh one, whose weights and adapters all matter."""
  one = lambda a: np.asarray(a) * (0.5 if a.ndim > 1 else 1.0)
  return fresh._replace(**jax.tree.map(one, tiny.draw(model)))


def case(axis: str, one: Steps, config: ds.RunConfig, model: ds.Model) -> dict:
  made = StagedSteps if axis == 'stage' else Steps
  many = made(
    model, dataclasses.replace(config, mesh=ds.MeshConfig(**{axis: 2}))
  )
  fresh = jax.tree.map(np.array, (many.whole(many.begin()), one.begin()))
  start = jax.tree.map(np.array, begun(model, fresh[0]))
  if axis != 'stage':
    places = many._where.shardings(start, model.abstract)
    seen, got = run(many, jax.device_put(start, places))
  else:
    seen, got = run(many, many.adopt(start))
  wanted, want = run(one, jax.device_put(begun(model, fresh[1])))
  return {
    'begun': gap(*fresh),
    'metrics': tiny.largest(gap(s, w) for s, w in zip(seen, wanted)),
    'params': gap(got.params, want.params),
    'moments': gap(got.moments, want.moments),
    'moved': gap(want.params, begun(model, fresh[1]).params),
  }


def main(name: str, *axes: str) -> dict:
  base = tiny.config(name)
  names = ('segments', 'head', *(('mtp',) if base.mtp.depth else ()))
  lora = ds.LoRAConfig(names, rank=3, alpha=2.0)
  model = ds.build(dataclasses.replace(base, lora=lora))
  config = ds.RunConfig(
    model.config,
    datalib.DataConfig(vocab_size=tiny.VOCAB, seq_len=T, cross_document=False),
    RECIPE,
  )
  one = Steps(model, config)
  return {axis: case(axis, one, config, model) for axis in axes}


if __name__ == '__main__':
  print(json.dumps(main(*sys.argv[1:])))
