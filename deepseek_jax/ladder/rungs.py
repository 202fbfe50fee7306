"""Lists the rungs: Llama, DeepSeekMoE, V2, V3, V3.2 and V4, idea by idea.

A rung says which fields of a run it changes, and to what; everything else is
the run below. Order: arXiv:2407.21783 (Llama 3), 2401.06066 (DeepSeekMoE),
2405.04434 (V2), 2408.15664 and 2412.19437 (V3), 2512.02556 (V3.2), DeepSeek-V4,
2512.24880 (mHC), 2601.07372 (Engram), Muon.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.config_changes import changed
from deepseek_jax.data.config import DataConfig
from deepseek_jax.errors import InputError
from deepseek_jax.ladder.sizes import SIZES, LadderSize, Shape
from deepseek_jax.ladder.trials import spent
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import IndexerConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.transformer_config import Kind, TransformerConfig
from deepseek_jax.presets import layout
from deepseek_jax.run.config import EvaluateConfig, RunConfig
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.muon import MuonConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)

_ALL_DOCUMENTS = 10**6  # more than any corpus holds out


class Rung(NamedTuple):
  """Describes one step of the ladder.

  Attributes:
    name: of the rung and of its runs.
    generation: the model that brought the idea.
    idea: what replaces what.
    fields: dotted fields of a run that it changes.
    change: the values, dotted field -> value, for a shape.
  """

  name: str
  generation: str
  idea: str
  fields: tuple[str, ...]
  change: Callable[[Shape], dict[str, Any]]


def _coarse(s: Shape) -> dict[str, Any]:
  """Returns conventional experts with an auxiliary balance loss."""
  return {
    'model.layout': layout(s.dense, s.layers - s.dense),
    'model.moe': MoEConfig(
      experts=s.experts // s.coarser,
      top_k=s.top_k // s.coarser,
      width=s.coarser * s.ffn // s.top_k,
      shared=0,
      router=RouterConfig(scoring='softmax', bias=False, normalize=False),
      # DeepSeekMoE's validation experiments have 0.01.
      balance=BalanceConfig(expert=0.01),
    ),
  }


def _fine(s: Shape) -> dict[str, Any]:
  """Returns the same experts, each cut into several."""
  return {
    'model.moe.experts': s.experts,
    'model.moe.top_k': s.top_k,
    'model.moe.width': s.ffn // s.top_k,
  }


def _shared(s: Shape) -> dict[str, Any]:
  """Returns as many experts, of which some are every token's."""
  return {
    'model.moe.experts': s.experts - s.shared,
    'model.moe.top_k': s.top_k - s.shared,
    'model.moe.shared': s.shared,
  }


def _latent(s: Shape) -> dict[str, int]:
  """Returns the shapes of latent attention."""
  return {
    'heads': s.heads,
    'q_rank': s.q_rank,
    'kv_rank': s.kv_rank,
    'nope_dim': s.head_dim,
    'rope_dim': s.rope_dim,
    'v_dim': s.head_dim,
  }


def _dsa(s: Shape) -> dict[str, Any]:
  """Returns latent attention to the tokens that an indexer picks."""
  indexer = IndexerConfig(heads=s.index_heads, dim=s.index_dim)
  return {
    'model.attention': DSAConfig(
      **_latent(s), indexer=indexer, top_k=s.picked, block=32
    )
  }


def _csa(s: Shape) -> dict[str, Any]:
  """Returns V4's attention: a window, and CSA and HCA layers in turn."""
  moe = s.layers - s.dense
  order = (
    (('dense',), s.dense),
    (('csa', 'hca'), moe // 2),
    (('csa',), moe % 2),
  )
  return {
    'model.attention': SharedKVConfig(
      heads=s.heads,
      head_dim=s.entry_dim,
      rope_dim=s.rope_dim,
      q_rank=s.q_rank,
      groups=s.groups,
      o_rank=s.o_rank,
      window=s.window,
      csa=CSAConfig(
        ratio=s.csa_ratio,
        top_k=s.entries,
        index_heads=s.index_heads,
        index_dim=s.index_dim,
      ),
      hca=HCAConfig(ratio=s.hca_ratio),
    ),
    'model.kinds.csa': Kind('moe', (('attention.compress', 'csa'),)),
    'model.kinds.hca': Kind('moe', (('attention.compress', 'hca'),)),
    'model.layout': tuple(run for run in order if run[1]),
  }


def _engram(s: Shape) -> dict[str, Any]:
  """Returns an Engram before the first layer of experts."""
  left = s.layers - s.dense - 1
  order = (
    (('dense',), s.dense),
    (('memory',), 1),
    (('hca', 'csa'), left // 2),
    (('hca',), left % 2),
  )
  change = (('attention.compress', 'csa'),)
  return {
    'model.engram': EngramConfig(base=s.rows, heads=s.tables, dim=s.row_dim),
    'model.kinds.memory': Kind('moe', change, engram=True),
    'model.layout': tuple(run for run in order if run[1]),
  }


RUNGS = (
  Rung('mha', 'dense', 'SwiGLU and multi-head attention', (), lambda s: {}),
  Rung(
    'gqa',
    'Llama 3',
    'several queries share a key head',
    ('model.attention.kv_heads',),
    lambda s: {'model.attention.kv_heads': s.kv_heads},
  ),
  Rung(
    'coarse',
    'before DeepSeekMoE',
    'conventional experts in place of the dense FFN',
    ('model.moe', 'model.layout'),
    _coarse,
  ),
  Rung(
    'fine',
    'DeepSeekMoE',
    'fine-grained experts: as wide together, more to choose from',
    ('model.moe.experts', 'model.moe.top_k', 'model.moe.width'),
    _fine,
  ),
  Rung(
    'shared',
    'DeepSeekMoE',
    'some of the experts are shared by all tokens',
    ('model.moe.experts', 'model.moe.top_k', 'model.moe.shared'),
    _shared,
  ),
  Rung(
    'mla',
    'V2',
    'multi-head latent attention',
    ('model.attention',),
    lambda s: {'model.attention': MLAConfig(**_latent(s))},
  ),
  Rung(
    'bias',
    'V3',
    'loss-free balance: a selection bias in place of the loss',
    (
      'model.moe.router.bias',
      'model.moe.balance.expert',
      'model.moe.balance.sequence',
    ),
    lambda s: {
      'model.moe.router.bias': True,
      'model.moe.balance': BalanceConfig(sequence=1e-4),
    },
  ),
  Rung(
    'sigmoid',
    'V3',
    'sigmoid gates that add up to one',
    ('model.moe.router.scoring', 'model.moe.router.normalize'),
    lambda s: {
      'model.moe.router.scoring': 'sigmoid',
      'model.moe.router.normalize': True,
    },
  ),
  Rung(
    'mtp',
    'V3',
    'multi-token prediction, one depth',
    ('model.mtp.depth',),
    lambda s: {'model.mtp.depth': 1},
  ),
  Rung(
    'dsa',
    'V3.2',
    'sparse attention to what an indexer picks',
    ('model.attention',),
    _dsa,
  ),
  Rung(
    'csa',
    'V4',
    'window and compressed entries, CSA and HCA in turn',
    ('model.attention', 'model.kinds', 'model.layout'),
    _csa,
  ),
  Rung(
    'mhc',
    'V4',
    'manifold-constrained hyper-connections',
    ('model.residual',),
    lambda s: {'model.residual': HyperConnectionsConfig()},
  ),
  Rung(
    'engram',
    'Engram',
    'a table of n-grams before the first experts',
    ('model.engram', 'model.kinds', 'model.layout'),
    _engram,
  ),
  Rung(
    'muon',
    'V4',
    'Muon updates the matrices in place of AdamW',
    ('train.optimizer.muon',),
    lambda s: {'train.optimizer.muon': MuonConfig()},
  ),
)


def names() -> tuple[str, ...]:
  """Returns the names of the rungs, from the bottom."""
  return tuple(rung.name for rung in RUNGS)


def _first(size: LadderSize) -> RunConfig:
  """Returns the run of the lowest rung: a dense transformer under AdamW.

  The learning rate is constant after its warm-up, and so is what else might
  follow the run's length: the first steps of a long run are a short run.
  """
  s = size.shape
  return RunConfig(
    model=TransformerConfig(
      vocab_size=s.vocab,
      dim=s.dim,
      layout=layout(s.layers, 0),
      attention=GQAConfig(s.heads, kv_heads=s.heads, head_dim=s.head_dim),
      ffn=FFNConfig(s.ffn),
      init_std=0.02,
    ),
    data=DataConfig(
      vocab_size=s.vocab,
      seq_len=size.seq_len,
      fim_rate=0.0,
      heldout_fraction=size.heldout,
    ),
    train=TrainConfig(
      tokens=float(size.batch * size.seq_len),
      batch=BatchConfig(size.batch),
      schedule=ScheduleConfig(
        'constant', peak=size.rates[0], warmup=size.warmup
      ),
      mtp_weight=SwitchConfig(0.3, 0.3, 1.0),
      bias_rate=SwitchConfig(0.001, 0.001, 1.0),
    ),
    evaluate=EvaluateConfig(documents=_ALL_DOCUMENTS, stride=size.seq_len),
    checkpoint_every=100,
    keep=1,
  )


def climbed(
  size: LadderSize, rungs: Sequence[Rung] = RUNGS
) -> dict[str, RunConfig]:
  """Returns the run of every rung, of one step each: see `trials`."""
  out, run = {}, _first(size)
  for rung in rungs:
    run = changed(run, rung.change(size.shape))
    out[rung.name] = run
  return out


def config(name: str, size: str = 'half_hour') -> RunConfig:
  """Returns the run of a rung, as long as the largest budget of a size.

  Raises:
    InputError: there is no such rung or size.
  """
  if size not in SIZES:
    raise InputError(f'size = {size!r}: must be one of {", ".join(SIZES)}')
  if name not in names():
    raise InputError(f'rung = {name!r}: must be one of {", ".join(names())}')
  chosen = SIZES[size]
  return spent(climbed(chosen)[name], chosen.budgets)


def shaped(shape: Shape, rung: str) -> TransformerConfig:
  """Returns the model of a rung in another shape, for the planner."""
  size = dataclasses.replace(SIZES['half_hour'], shape=shape)
  return climbed(size)[rung].model
