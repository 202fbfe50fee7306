"""A tiny run over rollouts as a process of its own.

    python -m tests.faults.rollouts_worker --home=... --workdir=...

Ends with one JSON line: the SHA-256 of the final state.
"""

import json
import time
from pathlib import Path
from unittest import mock

from absl import flags

import deepseek_jax as ds
from deepseek_jax import presets
from deepseek_jax.cli import common, process_flags
from deepseek_jax.parallel import placement
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import rl
from tests.faults import worker
from tests.faults.rollouts_task import fingerprint, folder_of

flags.adopt_module_key_flags(worker)


def config(folder: Path) -> ds.RunConfig:
  """Two updates a round, a new reference every four, every step is saved."""
  model = ds.changed(
    presets.v3_tiny(),
    {
      'vocab_size': 261,
      'dim': 16,
      'layout': ((('moe',), 1),),
      'attention.heads': 2,
      'attention.q_rank': 8,
      'attention.kv_rank': 8,
      'attention.nope_dim': 4,
      'attention.rope_dim': 4,
      'attention.v_dim': 4,
      'moe.width': 8,
      'moe.top_k': 2,
      'moe.experts': 8,
      'mtp.depth': 0,
    },
  )
  return ds.RunConfig(
    model,
    ds.DataConfig(
      path=str(folder / 'task.json'),
      tokenizer='bytes',
      vocab_size=261,
      seq_len=16,
      fim_rate=0.0,
    ),
    ds.TrainConfig(
      16 * 8 * 24,
      ds.BatchConfig(8),
      schedule=ds.ScheduleConfig('constant', peak=0.01, warmup=0),
    ),
    objective=ds.GRPOConfig(
      kl='ratio_k3',
      kl_weight=0.01,
      reference_every=4,
      keep_routing=True,
      keep_sampling_mask=True,
      dynamic_sampling=True,
    ),
    rollouts=ds.RolloutConfig(
      prompts=4,
      group=4,
      most=3,
      updates=2,
      redraws=1,
      top_p=0.95,
      slots=8,
      compare_every=2,
    ),
    chat=ds.ChatConfig('plain'),
    checkpoint_every=1,
    keep=2,
  )


def paused(call):
  """Returns a call with a pause before it, in which a kill may come."""

  def run(*args):
    time.sleep(flags.FLAGS.pause)
    return call(*args)

  return run


def main(argv) -> None:
  del argv
  drawn, rewards = rl.RolloutBatches.next, rl.Answerer.rewards
  with (
    mock.patch.object(rl.RolloutBatches, 'next', paused(drawn)),
    mock.patch.object(rl.Answerer, 'rewards', paused(rewards)),
  ):
    home = folder_of(Path(flags.FLAGS.home))
    run = ds.fit(config(home), flags.FLAGS.workdir)
  state = placement.to_first(run.state)
  done = {}
  if distributed.first():
    done['state'] = fingerprint(state)
  print(json.dumps(done), flush=True)


if __name__ == '__main__':
  common.launch(main, join=process_flags.join)
