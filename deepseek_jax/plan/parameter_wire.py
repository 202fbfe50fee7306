"""Bytes that weights and their gradients send in a step.

Gradients are summed over the devices that hold the same weights and see other
tokens; what fsdp cuts is gathered where it is used, and its gradients scatter.
"""

import re

from deepseek_jax.plan.memory import BYTES, replicas
from deepseek_jax.plan.mesh import Share
from deepseek_jax.plan.rings import Step, Wire, link_of, ring
from deepseek_jax.transformer import TransformerConfig

# Summed inside shard_map, over all devices at once.
_AT_ONCE = re.compile(
  r'(\.kv_up|\.compressor\.(bias|norm\.scale)|\.compress_[kv]\.\w+)$'
)


def _sums(step: Step, share: Share, devices: int) -> tuple[int, ...]:
  """Sizes of the groups of devices that sum a parameter's gradient in a step.

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


def gradients(step: Step, held) -> list[Wire]:
  """Sum of gradients over the devices that hold the same weights."""
  out, zero = {}, step.training.zero
  # DualPipe: two ranks hold the same stages.
  copies = 2 if step.training.both_ends and step.mesh.stage > 1 else 1
  compute = BYTES[step.config.compute.dtype]
  for share in held:
    n = copies * replicas(share, step.mesh)
    if n == 1 or not share.trained:
      continue
    over = ('data', 'fsdp', 'expert', 'context')
    axes = tuple(
      a for a in over if a not in share.over and getattr(step.mesh, a) > 1
    ) + ('stage',) * (copies - 1)
    size = 4 * share.elements
    sent = sum(2 * ring(ways, size) for ways in _sums(step, share, n))
    if zero:
      width = compute if share.matrix else 4
      sent = ring(n, 4 * share.elements) + ring(n, width * share.elements)
    out[axes] = out.get(axes, 0) + sent
  how = (
    'reduce-scatter of float32 gradients, all-gather of weights: (n-1)/n each'
    if zero
    else 'ring all-reduce of float32 gradients, of embedding and head once per'
    ' use, and over the context axis by itself: 2 (n-1)/n'
  )
  return [
    Wire(f'gradients over {"+".join(axes)}', link_of(step, axes), sent, how)
    for axes, sent in out.items()
  ]


def _uses(config: TransformerConfig, name: str) -> int:
  """How often a step makes a gradient of a parameter: once per use."""
  each = 1 + config.mtp.depth
  return {'embed': each * (2 if config.tied else 1), 'head': each}.get(name, 1)


def _gathers(config: TransformerConfig, share: Share) -> int:
  """How often a step gathers a weight that fsdp cuts.

  Where it is used: a scanned layer's forward and backward, other layers' once
  unless they are recomputed. The embedding is looked up forward only, and the
  head makes its gradients in the forward pass. Of experts gate and up lie side
  by side for one product; so they are kept, unless they are recomputed.
  """
  again = config.compute.remat != 'none'
  path = share.name.split('.')
  if path[0] != 'segments':
    return 1
  if config.compute.scan and config.segments()[int(path[1])].repeat > 1:
    again |= not (share.routed and path[-1] == 'gate_up')
  return 1 + again


def fsdp(step: Step, held) -> list[Wire]:
  """Weights gathered where they are used, gradients scattered."""
  n = step.mesh.fsdp
  if n == 1:
    return []
  compute, sent = BYTES[step.config.compute.dtype], 0
  for share in held:
    if 'fsdp' in share.over:
      full = share.elements * n
      gathered = _gathers(step.config, share) * step.micro_batches
      scattered = _uses(step.config, share.name)
      sent += gathered * ring(n, compute * full) + scattered * ring(n, 4 * full)
  how = (
    'weights gathered where they are used: twice per micro-batch in scanned or'
    ' recomputed layers, else once; gradients scattered once per step, of'
    ' embedding and head once per use: (n-1)/n each'
  )
  return [Wire('weights over fsdp', link_of(step, ('fsdp',)), sent, how)]
