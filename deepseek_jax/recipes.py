"""Run configurations by name: a model, its data and how it is trained.

Each function returns a `RunConfig`, which `ds.changed` edits:
`ds.changed(ds.recipes.v3_tiny(), {'model.moe.top_k': 2})`. All of them train on
the source code of Python's standard library unless `data.path` says otherwise.
"""

import dataclasses

from deepseek_jax import presets
from deepseek_jax.config_changes import changed
from deepseek_jax.data.config import DataConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.rope import RopeConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.rl.grpo import GRPOConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.sft import SFTConfig
from deepseek_jax.run.config import EvaluateConfig, RunConfig
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.muon import MuonConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)


def _run(
  model: TransformerConfig,
  train: TrainConfig,
  *,
  validate: int = 0,
  checkpoint_every: int = 0,
  **data,
) -> RunConfig:
  return RunConfig(
    model=model,
    data=DataConfig(vocab_size=model.vocab_size, seq_len=256, **data),
    train=train,
    evaluate=EvaluateConfig(every=validate),
    checkpoint_every=checkpoint_every,
  )


def _train(tokens: float, schedule: ScheduleConfig, **changes) -> TrainConfig:
  return TrainConfig(
    tokens=tokens, batch=BatchConfig(size=8), schedule=schedule, **changes
  )


def v3_tiny() -> RunConfig:
  """Returns a V3-style run: about four minutes on two CPU cores."""
  return _run(
    presets.v3_tiny(),
    _train(6.4e5, ScheduleConfig(peak=3e-3, warmup=20)),
    validate=50,
    checkpoint_every=100,
  )


def v32_tiny() -> RunConfig:
  """Returns a V3.2-style run: sparse attention from the first step.

  Two minutes on two CPU cores. `recall` in the metrics is the share of dense
  attention's mass that the indexer's 64 of 256 tokens have.
  """
  return _run(
    presets.v32_tiny(), _train(1.2e5, ScheduleConfig(peak=3e-3, warmup=10))
  )


def v32_warmup() -> RunConfig:
  """Returns stage one from dense to sparse: indexers imitate attention.

  Everything else is frozen, router biases too, and attention stays dense. The
  stage ends after its tokens, or earlier with `train.recall_goal`. It begins
  from a run of `v3_tiny` (`init_from`); `v32_sparse` goes on from it. Each
  stage reads the corpus from its start, in the order that `data.seed` gives.
  """
  return _run(
    changed(presets.v32_tiny(), {'attention.stage': 'dense'}),
    _train(
      1e5,
      ScheduleConfig('constant', peak=1e-3, warmup=0),
      trainable=('indexer',),
    ),
  )


def v32_sparse() -> RunConfig:
  """Returns stage two from dense to sparse: everything learns.

  Attention reads top_k tokens. The indexers learn from their own loss, over
  the tokens that they pick; the model learns from its own.
  """
  return _run(
    presets.v32_tiny(),
    _train(
      1e5,
      ScheduleConfig('constant', peak=1e-4, warmup=0),
      mtp_weight=SwitchConfig(0.1, 0.1, 0.5),
      bias_rate=SwitchConfig(0.0, 0.0, 0.5),
    ),
  )


def v4_tiny() -> RunConfig:
  """Returns a V4-style run: about two minutes on two CPU cores.

  Compressed sparse and heavily compressed attention, hyper-connections, hash
  routing and Muon. Documents of a window do not attend to each other, as in
  V4's pre-training. V4 begins dense and warms its indexers up: two runs with
  `model.attention.csa.stage = 'dense'`, of which the second trains
  `('indexer',)` alone, each `init_from` the one before.
  """
  return _run(
    presets.v4_tiny(),
    _train(
      1.2e5,
      ScheduleConfig(peak=8e-3, warmup=10),
      optimizer=OptimizerConfig(eps=1e-20, muon=MuonConfig()),
    ),
    validate=30,
    checkpoint_every=60,
    cross_document=False,
  )


def nsa_tiny() -> RunConfig:
  """Returns a run with native sparse attention: two minutes on two cores.

  A query reads compressed blocks, five selected blocks of 16 tokens and a
  window of 64, of 256 tokens.
  """
  return _run(
    presets.nsa_tiny(), _train(1.2e5, ScheduleConfig(peak=3e-3, warmup=10))
  )


def engram_tiny() -> RunConfig:
  """Returns a run with an Engram: two minutes on two cores.

  2.1 of 7.6 million weights lie in a table of which a token reads eight rows;
  the data pipeline hashes n-grams to rows ahead.
  """
  return _run(
    presets.engram_tiny(), _train(2e5, ScheduleConfig(peak=3e-3, warmup=10))
  )


def sft_tiny() -> RunConfig:
  """Returns fine-tuning on conversations in bytes, packed into 256 tokens.

  `data.path` names them. It begins with the weights of a run (`init_from`) or
  fresh, and takes that run's `tokenizer.json` and model. Router biases are
  frozen; the rate falls to a tenth, as R1's does (arXiv:2501.12948).
  """
  made = _run(
    presets.v3_tiny(),
    _train(
      2e5,
      ScheduleConfig('cosine', peak=1e-3, warmup=10),
      mtp_weight=SwitchConfig(0.1, 0.1, 0.5),
      bias_rate=SwitchConfig(0.0, 0.0, 0.5),
    ),
    validate=50,
    checkpoint_every=100,
    path='conversations.jsonl',
    tokenizer='bytes',
    fim_rate=0.0,
    heldout_fraction=0.1,
  )
  return dataclasses.replace(
    made, objective=SFTConfig(), chat=ChatConfig('plain')
  )


def grpo_tiny() -> RunConfig:
  """Returns reinforcement on the task that `data.path` names, in bytes.

  It begins with the weights of a run (`init_from`), as of `sft_tiny`: a model
  that never answers rightly learns nothing. Group mean and deviation, no KL,
  DAPO's clip range; router biases are frozen.
  """
  made = _run(
    presets.v3_tiny(),
    _train(
      64 * 128 * 200.0,
      ScheduleConfig('constant', peak=3e-4, warmup=0),
      bias_rate=SwitchConfig(0.0, 0.0, 0.5),
    ),
    validate=20,
    checkpoint_every=50,
    path='task.json',
    tokenizer='bytes',
    fim_rate=0.0,
  )
  return changed(
    dataclasses.replace(
      made,
      objective=GRPOConfig(clip_high=0.28),
      rollouts=RolloutConfig(prompts=32, group=8, most=32),
      chat=ChatConfig('plain'),
    ),
    {'data.seq_len': 128, 'train.batch.size': 64, 'evaluate.documents': 64},
  )


def distill_tiny() -> RunConfig:
  """Returns distillation of a dense student towards `objective.teachers`.

  The student is a Llama in bytes, the teachers any models of its tokens. On the
  conversations that `data.path` names, by the forward divergence; with
  `rollouts` on its own answers to a task, for which `objective.beta` = 1 is
  V4's reverse one.
  """
  student = TransformerConfig(
    vocab_size=4096,
    dim=192,
    layout=((('dense',), 4),),
    attention=GQAConfig(
      heads=6,
      kv_heads=2,
      head_dim=32,
      rope=RopeConfig(interleaved=False),
    ),
    ffn=FFNConfig(512),
    norm_eps=1e-5,
    init_std=0.02,
  )
  made = _run(
    student,
    _train(2e5, ScheduleConfig('cosine', peak=2e-3, warmup=10)),
    validate=50,
    checkpoint_every=100,
    path='conversations.jsonl',
    tokenizer='bytes',
    fim_rate=0.0,
    heldout_fraction=0.1,
  )
  return dataclasses.replace(
    made, objective=DistillConfig(beta=0.0), chat=ChatConfig('plain')
  )
