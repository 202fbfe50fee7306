"""Describes a small R1: models, data and the length of every stage."""

import dataclasses

from deepseek_jax.config import above, at_least, within
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.rope import RopeConfig
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import TransformerConfig

_VOCAB = 261  # bytes, and five special tokens


def teacher() -> TransformerConfig:
  """Returns V3 in every idea, in bytes, with less than a million parameters."""
  return TransformerConfig(
    vocab_size=_VOCAB,
    dim=128,
    layout=((('dense', 'moe', 'moe'), 1),),
    attention=MLAConfig(
      heads=4, q_rank=64, kv_rank=48, nope_dim=16, rope_dim=16, v_dim=32
    ),
    ffn=FFNConfig(256),
    moe=MoEConfig(
      experts=8,
      top_k=2,
      width=64,
      shared=1,
      router=RouterConfig(groups=4, top_groups=2, scale=2.5),
      balance=BalanceConfig(sequence=1e-4),
    ),
    mtp=MTPConfig(depth=1),
    init_std=0.04,
  )


def llama() -> TransformerConfig:
  """Returns the student: a dense Llama of half a million parameters."""
  return TransformerConfig(
    vocab_size=_VOCAB,
    dim=128,
    layout=((('dense',), 3),),
    attention=GQAConfig(
      heads=4, kv_heads=2, head_dim=32, rope=RopeConfig(interleaved=False)
    ),
    ffn=FFNConfig(320),
    norm_eps=1e-5,
    init_std=0.04,
  )


@dataclasses.dataclass(frozen=True)
class R1Recipe:
  """Describes a small R1; every field changes what is trained.

  Attributes:
    model, student: what is trained, and what it is distilled into.
    seed: of weights, data and rollouts.
    seq_len: T of every stage.
    lines: of synthetic text.
    digits: of the numbers that are added.
    additions, countdowns: problems of either kind.
    heldout: share of the problems that is never trained on.
    first: conversations of the cold start.
    forget, miss: shares of its answers that forget carries, and that miss the
      target.
    pretrain, cold, sft, distill: tokens of these stages.
    pretrain_rate, cold_rate, rl_rate: highest learning rates; supervised
      stages after the first take the second.
    batch: rows of a supervised step.
    prompts, group, most: of a round of rollouts, see RolloutConfig.
    slots: answers that are decoded together.
    rounds, more_rounds: of the first and the second reinforcement.
    validate: rounds between validations.
    asked, drawn: prompts and answers of each when answers are collected.
    measured, draws: held-out problems of each kind, and answers of each, that
      are scored after a stage.
    format_weight: of the reward for the form beside that of 1 for the answer.
  """

  model: TransformerConfig = dataclasses.field(default_factory=teacher)
  student: TransformerConfig = dataclasses.field(default_factory=llama)
  seed: int = 0
  seq_len: int = 79
  lines: int = 60_000
  digits: int = 2
  additions: int = 1500
  countdowns: int = 700
  heldout: float = 0.1
  first: int = 6000
  forget: float = 0.65
  miss: float = 0.5
  pretrain: float = 1e6
  cold: float = 8e5
  sft: float = 7e5
  distill: float = 5e5
  pretrain_rate: float = 3e-3
  cold_rate: float = 1.5e-3
  rl_rate: float = 1.5e-4
  batch: int = 32
  prompts: int = 32
  group: int = 8
  most: int = 66
  slots: int = 64
  rounds: int = 80
  more_rounds: int = 30
  validate: int = 10
  asked: int = 2048
  drawn: int = 4
  measured: int = 50
  draws: int = 16
  format_weight: float = 0.2

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, seed=0, seq_len=8, lines=1, digits=1, additions=1)
    at_least(self, countdowns=0, first=1, batch=1, prompts=1, group=2, most=1)
    at_least(self, slots=1, rounds=1, more_rounds=1, validate=1, asked=1)
    at_least(self, drawn=1, measured=1, draws=1, format_weight=0)
    above(self, pretrain=0, cold=0, sft=0, distill=0)
    above(self, pretrain_rate=0, cold_rate=0, rl_rate=0)
    within(self, ends='()', heldout=(0, 1))
    within(self, forget=(0, 1), miss=(0, 1))
