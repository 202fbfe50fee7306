"""Returns published models as configurations, and tiny twins of them.

Shapes: DeepSeekMoE arXiv:2401.06066, V2 arXiv:2405.04434, V3 arXiv:2412.19437,
V3.2 arXiv:2512.02556 and the configurations released with them; Llama 3.1
arXiv:2407.21783.
"""

import dataclasses
from typing import Any

from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import IndexerConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.rope import (
  Llama3Config,
  RopeConfig,
  YarnConfig,
)
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import Kind, TransformerConfig


def layout(dense: int, moe: int) -> tuple:
  """Returns the layout of leading dense blocks, then MoE blocks."""
  runs = ((('dense',), dense), (('moe',), moe))
  return tuple(run for run in runs if run[1])


def _softmax_router(**fields: Any) -> RouterConfig:
  """Returns the router before V3: softmax gates, not normalized, no bias."""
  return RouterConfig(scoring='softmax', bias=False, normalize=False, **fields)


def _yarn(mscale: float) -> RopeConfig:
  """Returns YaRN rope; both of its `mscale`s are equal."""
  return RopeConfig(scaling=YarnConfig(mscale=mscale, mscale_all_dim=mscale))


def moe_16b() -> TransformerConfig:
  """Returns DeepSeekMoE 16B.

  Multi-head attention, 64 experts, greedy softmax.
  """
  return TransformerConfig(
    vocab_size=102400,
    dim=2048,
    layout=layout(1, 27),
    attention=GQAConfig(heads=16, kv_heads=16, head_dim=128),
    ffn=FFNConfig(10944),
    moe=MoEConfig(
      experts=64,
      top_k=6,
      width=1408,
      shared=2,
      router=_softmax_router(),
      balance=BalanceConfig(expert=0.001),
    ),
  )


def v2_lite() -> TransformerConfig:
  """Returns DeepSeek-V2-Lite: MLA without query compression."""
  return TransformerConfig(
    vocab_size=102400,
    dim=2048,
    layout=layout(1, 26),
    attention=MLAConfig(
      heads=16,
      q_rank=None,
      kv_rank=512,
      nope_dim=128,
      rope_dim=64,
      v_dim=128,
      rope=_yarn(0.707),
    ),
    ffn=FFNConfig(10944),
    moe=MoEConfig(
      experts=64,
      top_k=6,
      width=1408,
      shared=2,
      router=_softmax_router(),
      balance=BalanceConfig(expert=0.001),
    ),
  )


def v2() -> TransformerConfig:
  """Returns DeepSeek-V2: group-limited softmax of 8 devices, gates times 16."""
  return TransformerConfig(
    vocab_size=102400,
    dim=5120,
    layout=layout(1, 59),
    attention=MLAConfig(
      heads=128,
      q_rank=1536,
      kv_rank=512,
      nope_dim=128,
      rope_dim=64,
      v_dim=128,
      rope=_yarn(0.707),
    ),
    ffn=FFNConfig(12288),
    moe=MoEConfig(
      experts=160,
      top_k=6,
      width=1536,
      shared=2,
      router=_softmax_router(
        groups=8, top_groups=3, group_score='max', scale=16.0
      ),
      balance=BalanceConfig(
        expert=0.003,
        device=0.05,
        communication=0.02,
        devices=8,
        device_limit=3,
      ),
    ),
  )


def v3() -> TransformerConfig:
  """Returns DeepSeek-V3 and R1.

  Sigmoid gates with a selection bias, one MTP depth.
  """
  return TransformerConfig(
    vocab_size=129280,
    dim=7168,
    layout=layout(3, 58),
    attention=MLAConfig(
      heads=128,
      q_rank=1536,
      kv_rank=512,
      nope_dim=128,
      rope_dim=64,
      v_dim=128,
      rope=_yarn(1.0),
    ),
    ffn=FFNConfig(18432),
    moe=MoEConfig(
      experts=256,
      top_k=8,
      width=2048,
      shared=1,
      router=RouterConfig(groups=8, top_groups=4, scale=2.5),
      balance=BalanceConfig(sequence=1e-4),
    ),
    mtp=MTPConfig(depth=1),
  )


def v3_tiny() -> TransformerConfig:
  """Returns V3 in every idea, small enough to train on a laptop in minutes.

  Plain rope, as V3 had before its length extension. The layers are one pattern
  that occurs once, so nothing is scanned: the fastest form on a CPU.
  """
  return TransformerConfig(
    vocab_size=4096,
    dim=256,
    layout=((('dense', 'moe', 'moe', 'moe'), 1),),
    attention=MLAConfig(
      heads=4,
      q_rank=128,
      kv_rank=64,
      nope_dim=32,
      rope_dim=16,
      v_dim=32,
    ),
    ffn=FFNConfig(512),
    moe=MoEConfig(
      experts=16,
      top_k=4,
      width=96,
      shared=1,
      router=RouterConfig(groups=4, top_groups=2, scale=2.5),
      balance=BalanceConfig(sequence=1e-4),
    ),
    mtp=MTPConfig(depth=1),
    init_std=0.02,
  )


def engram_tiny() -> TransformerConfig:
  """Returns three layers of v3_tiny(), the second with an Engram of n-grams.

  Its table holds 2.1 of 7.6 million parameters and costs next to no FLOPs.
  """
  dense = v3_tiny()
  return dataclasses.replace(
    dense,
    layout=((('dense', 'memory', 'moe'), 1),),
    kinds={**dense.kinds, 'memory': Kind('moe', engram=True)},
    engram=EngramConfig(base=16384, heads=4, dim=64),
    mtp=MTPConfig(depth=0),
  )


def v4_kinds(vocab: int) -> dict[str, Kind]:
  """Returns V4's blocks: of a window alone, or with compressed entries.

  Those whose name ends in `_hash` route by token: a table from the token's id
  to its experts, of a vocabulary of `vocab`, in place of the bias.
  """
  table = (
    ('moe.router.bias', False),
    ('moe.router.hash_vocab', vocab),
    ('moe.balance.sequence', 0.0),  # the loss would not reach the choice
  )
  out = {}
  for name, compress in (('window', 'none'), ('csa', 'csa'), ('hca', 'hca')):
    change = (('attention.compress', compress),)
    out[name] = Kind('moe', change)
    out[f'{name}_hash'] = Kind('moe', change + table)
  return out


def _v4_moe(experts: int, top_k: int, width: int, scale: float) -> MoEConfig:
  """Returns V4's experts, whose gates are multiplied by `scale`."""
  return MoEConfig(
    experts=experts,
    top_k=top_k,
    width=width,
    shared=1,
    router=RouterConfig(scoring='sqrtsoftplus', scale=scale),
    balance=BalanceConfig(sequence=1e-4),
    limit=10.0,
  )


def v4_flash() -> TransformerConfig:
  """Returns DeepSeek-V4-Flash.

  CSA and HCA in turn, hyper-connections, hash routing.
  """
  return TransformerConfig(
    vocab_size=129280,
    dim=4096,
    layout=((('window_hash',), 2), (('csa_hash',), 1), (('hca', 'csa'), 20)),
    attention=SharedKVConfig(
      heads=64,
      head_dim=512,
      rope_dim=64,
      q_rank=1024,
      groups=8,
      o_rank=1024,
      csa=CSAConfig(top_k=512),
    ),
    moe=_v4_moe(256, 6, 2048, 1.5),
    residual=HyperConnectionsConfig(),
    kinds=v4_kinds(129280),
    mtp=MTPConfig(depth=1, block='window', streams=True),
    init_std=0.02,
  )


def v4_pro() -> TransformerConfig:
  """Returns DeepSeek-V4-Pro: as Flash, but it begins with two HCA layers."""
  return TransformerConfig(
    vocab_size=129280,
    dim=7168,
    layout=((('hca_hash',), 2), (('csa_hash',), 1), (('hca', 'csa'), 29)),
    attention=SharedKVConfig(
      heads=128,
      head_dim=512,
      rope_dim=64,
      q_rank=1536,
      groups=16,
      o_rank=1024,
      csa=CSAConfig(top_k=1024),
    ),
    moe=_v4_moe(384, 6, 3072, 2.5),
    residual=HyperConnectionsConfig(),
    kinds=v4_kinds(129280),
    mtp=MTPConfig(depth=1, block='window', streams=True),
    init_std=0.02,
  )


def v4_tiny() -> TransformerConfig:
  """Returns V4 in every idea, small enough to train on a laptop.

  It takes two minutes.
  """
  return TransformerConfig(
    vocab_size=4096,
    dim=192,
    layout=((('window_hash', 'csa', 'hca'), 1),),
    attention=SharedKVConfig(
      heads=4,
      head_dim=48,
      rope_dim=16,
      q_rank=96,
      groups=2,
      o_rank=64,
      window=32,
      csa=CSAConfig(top_k=16, index_heads=4, index_dim=32),
      hca=HCAConfig(ratio=16),
    ),
    moe=_v4_moe(8, 2, 96, 1.5),
    residual=HyperConnectionsConfig(),
    kinds=v4_kinds(4096),
    mtp=MTPConfig(depth=1, block='window', streams=True),
    init_std=0.02,
  )


def _sparse(attention: MLAConfig, **fields: Any) -> DSAConfig:
  """Returns the same latent attention, to what an indexer picks."""
  shapes = {
    f.name: getattr(attention, f.name) for f in dataclasses.fields(attention)
  }
  return DSAConfig(**shapes, **fields)


def v32() -> TransformerConfig:
  """Returns DeepSeek-V3.2: V3 that attends to an indexer's best 2048 tokens."""
  dense = v3()
  attention = _sparse(
    dense.attention, indexer=IndexerConfig(heads=64, dim=128), top_k=2048
  )
  return dataclasses.replace(dense, attention=attention)


def v32_tiny() -> TransformerConfig:
  """Returns v3_tiny() with an indexer that picks a quarter of 256 tokens."""
  dense = v3_tiny()
  attention = _sparse(
    dense.attention,
    indexer=IndexerConfig(heads=4, dim=32),
    top_k=64,
    block=32,  # fits a CPU's caches: three times as fast as 128 (measured)
  )
  return dataclasses.replace(dense, attention=attention)


def nsa_tiny() -> TransformerConfig:
  """Returns v3_tiny() with native sparse attention.

  It has a window of 64 tokens and blocks of 16.
  """
  attention = NSAConfig(
    heads=4,
    kv_heads=2,
    qk_dim=32,
    v_dim=32,
    block=16,
    stride=8,
    hidden=64,
    select_block=16,
    select=5,
    window=64,
    queries=32,
  )
  return dataclasses.replace(v3_tiny(), attention=attention)


def _llama31(
  layers: int, dim: int, heads: int, width: int
) -> TransformerConfig:
  """Returns a Llama 3.1: grouped queries, 8 key heads, scaled rope."""
  return TransformerConfig(
    vocab_size=128256,
    dim=dim,
    layout=layout(layers, 0),
    attention=GQAConfig(
      heads=heads,
      kv_heads=8,
      head_dim=128,
      rope=RopeConfig(
        theta=500000.0, interleaved=False, scaling=Llama3Config()
      ),
    ),
    ffn=FFNConfig(width),
    norm_eps=1e-5,
    init_std=0.02,
  )


def llama31_8b() -> TransformerConfig:
  """Returns Llama 3.1 8B."""
  return _llama31(32, 4096, 32, 14336)


def llama31_70b() -> TransformerConfig:
  """Returns Llama 3.1 70B."""
  return _llama31(80, 8192, 64, 28672)


def llama31_405b() -> TransformerConfig:
  """Returns Llama 3.1 405B."""
  return _llama31(126, 16384, 128, 53248)
