"""Says what a plan assumes, a sentence each."""

from deepseek_jax import own_classes
from deepseek_jax.config import to_dict
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.plan import flops as flop
from deepseek_jax.plan import memory
from deepseek_jax.plan.hardware import Cluster
from deepseek_jax.plan.recipe import Recipe


def _optimizer_assumptions(run: memory.Training) -> tuple[str, ...]:
  """Returns sentences on what is assumed of the optimizer."""
  kind, stage = run.optimizer.moments, f'ZeRO stage {run.zero}'
  if run.optimizer.muon is None:
    return (f'optimizer moments are {kind}, {stage}',)
  return (
    f"optimizer moments are {kind}, one for each of Muon's matrices and two for"
    f" each of AdamW's parameters, {stage}",
    "Muon's Newton-Schulz products, and the shards of matrices that they"
    ' gather, take no time',
  )


def _own_assumptions(config: TransformerConfig) -> tuple[str, ...]:
  """Returns a sentence for each of a user's classes without a cost."""
  found = own_classes.kinds(to_dict(config)).items()
  return tuple(
    f"{path} ({kind}) is counted as the library's class of that field"
    for path, kind in found
    if not hasattr(own_classes.find(kind), 'cost')
  )


def assumed(
  config: TransformerConfig, cluster: Cluster, recipe: Recipe
) -> tuple[str, ...]:
  """Returns sentences, one for every figure and assumption of the plan."""
  a, run = cluster.accelerator, recipe.training
  figures = {
    'bf16 peak': (a.bf16, 1e12, 'TFLOP/s'),
    'memory': (a.memory, 1e9, 'GB'),
    'memory bandwidth': (a.memory_bandwidth, 1e12, 'TB/s'),
    'fast link': (a.fast, 1e9, 'GB/s'),
    'slow link': (a.slow, 1e9, 'GB/s'),
  }
  stated = tuple(
    f'{a.name} {name} {f.value / scale:g} {unit} ({f.origin})'
    for name, (f, scale, unit) in figures.items()
  )
  return (
    *stated,
    'compute runs at the bf16 peak, whatever the dtype',
    f'model FLOPs reach {recipe.utilization:.1%} of it; '
    f'{flop.CONVENTIONS["half"]}; the backward pass is twice the forward',
    'executed FLOPs add multi-token prediction and what the backward pass'
    f' recomputes (remat = {config.compute.remat!r})',
    'blocks are spread evenly over stages; transfers between them take no'
    ' time in the bubble; an overlapped pair takes F + B',
    'gradients are summed over devices in every micro-batch, by pipelines once'
    ' per step',
    'experts are evenly loaded; node-limited traffic is at its limit of nodes',
    f'at most {recipe.exposed:.0%} of the time of dispatch and combine is'
    " exposed, by default as XLA schedules V3's layers on H200"
    ' (benchmarks/results/schedule.md); no bound of a step counts with it',
    'activations are what blocks save for the backward pass before XLA fuses'
    ' anything; the gathered weights of a block under fsdp are left out',
    *_own_assumptions(config),
    *_optimizer_assumptions(run),
    f'{recipe.dollars:g} dollars per device and hour',
    f'a host of {a.host.value:g} devices ({a.host.origin}) writes'
    f' {recipe.storage / 1e9:g} GB/s to storage',
  )
