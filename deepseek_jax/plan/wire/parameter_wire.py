"""Counts bytes that weights and their gradients send in a step.

Gradients are summed over the devices that hold the same weights and work on
other tokens; what fsdp shards is gathered where it is used, and its gradients
are scattered. The compiled step does both for every micro-batch. Pipeline ranks
are taken to add up the gradients of all chunks first, which
pipeline/pipeline.py, a program per chunk, leaves to XLA.
"""

import re
from collections.abc import Iterable

from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.plan.device_shares import DeviceShare
from deepseek_jax.plan.memory import BYTES, replicas
from deepseek_jax.plan.wire.rings import LinkTraffic, StepInputs, link_of, ring

# Summed inside shard_map, over all devices at once.
_AT_ONCE = re.compile(
  r'(\.kv_up|\.sinks|\.compressor\.(bias|norm\.scale)|\.compress_[kv]\.\w+)$'
)


def _sums(
  step: StepInputs, share: DeviceShare, devices: int
) -> tuple[int, ...]:
  """Returns sizes of the groups of devices that sum a parameter's gradient.

  XLA sums over the axes of a batch, then over that of its sequences, once per
  use: it adds up the uses of embedding and head after the devices.
  """
  n = step.mesh.context
  apart = tuple(ways for ways in (devices // n, n) if ways > 1)
  uses = 1 + step.config.mtp.depth
  once = apart if step.mesh.tensor > 1 else (devices,)
  if share.name == 'head':
    return uses * once
  if share.name == 'embed':
    return uses * (apart + once * step.config.tied)
  if share.routed or (n > 1 and _AT_ONCE.search(share.name)):
    return (devices,)
  return apart


def _often(step: StepInputs) -> int:
  """Returns how often a step sums gradients over devices."""
  return step.micro_batches if step.mesh.stage == 1 else 1


def gradients(
  step: StepInputs, held: Iterable[DeviceShare]
) -> list[LinkTraffic]:
  """Counts the sum of gradients over devices that hold the same weights."""
  out, zero, often = {}, step.training.zero, _often(step)
  # DualPipe: two ranks hold the same stages.
  copies = 2 if step.training.both_ends and step.mesh.stage > 1 else 1
  compute = BYTES[step.config.compute.products]
  for share in held:
    n = copies * replicas(share, step.mesh)
    if n == 1 or not share.trained:
      continue
    over = ('data', 'fsdp', 'expert', 'context')
    axes = tuple(
      a for a in over if a not in share.over and getattr(step.mesh, a) > 1
    ) + ('stage',) * (copies - 1)
    size = 4 * share.elements
    sent = often * sum(2 * ring(ways, size) for ways in _sums(step, share, n))
    if zero:
      width = compute if share.matrix else 4
      sent = often * ring(n, size) + ring(n, width * share.elements)
    out[axes] = out.get(axes, 0) + sent
  how = (
    'reduce-scatter of float32 gradients, all-gather of weights: (n-1)/n each'
    if zero
    else 'ring all-reduce of float32 gradients, of embedding and head once per'
    ' use, and over the context axis by itself: 2 (n-1)/n'
  )
  if often > 1:
    how += f'; gradients in each of {often} micro-batches'
  return [
    LinkTraffic(
      f'gradients over {"+".join(axes)}', link_of(step, axes), sent, how
    )
    for axes, sent in out.items()
  ]


def _uses(config: TransformerConfig, name: str) -> int:
  """Returns how often a step makes a gradient of a parameter: once per use."""
  each = 1 + config.mtp.depth
  return {'embed': each * (2 if config.tied else 1), 'head': each}.get(name, 1)


def _gathers(step: StepInputs, share: DeviceShare) -> int:
  """Returns how often a step gathers a weight that fsdp shards.

  It is gathered where it is used: a scanned layer's forward and backward, other
  layers' once unless they are recomputed. The embedding is looked up forward
  only, and the head makes its gradients in the forward pass. Gate and up of
  experts lie side by side for one product; so they are kept, unless they are
  recomputed. What is neither scanned nor recomputed XLA takes out of the loop
  of micro-batches.
  """
  config, micro = step.config, step.micro_batches
  once = micro if step.mesh.stage > 1 else 1
  again = config.compute.remat != 'none'
  path = share.name.split('.')
  if path[0] != 'segments':
    return once
  if config.compute.scan and config.segments()[int(path[1])].repeat > 1:
    again |= not (share.routed and path[-1] == 'gate_up')
    return micro * (1 + again)
  return once + micro * again


def fsdp(step: StepInputs, held: Iterable[DeviceShare]) -> list[LinkTraffic]:
  """Counts weights gathered where they are used, and gradients scattered."""
  n = step.mesh.fsdp
  if n == 1:
    return []
  compute, sent, often = BYTES[step.config.compute.products], 0, _often(step)
  for share in held:
    if 'fsdp' in share.over:
      full = share.elements * n
      gathered = _gathers(step, share)
      scattered = share.trained * _uses(step.config, share.name) * often
      sent += gathered * ring(n, compute * full) + scattered * ring(n, 4 * full)
  how = (
    'weights gathered where they are used: in scanned layers twice per'
    ' micro-batch, in others once per step, and again per micro-batch if they'
    ' are recomputed; gradients scattered once per'
    f' {"step" if step.mesh.stage > 1 else "micro-batch"}, of embedding and'
    ' head once per use: (n-1)/n each'
  )
  return [LinkTraffic('weights over fsdp', link_of(step, ('fsdp',)), sent, how)]
