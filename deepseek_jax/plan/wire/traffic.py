"""Counts bytes that a device sends per training step, by purpose and link.

A ring over n devices sends (n-1)/n of the bytes per reduce-scatter or
all-gather, twice that per all-reduce. Expert traffic is the mean under even
loads. Each entry names its formula. Legend: K experts per token, D model.
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

from deepseek_jax.errors import InputError
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel import formats
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.plan import device_shares as meshes
from deepseek_jax.plan.device_shares import Mesh
from deepseek_jax.plan.flops import blocks
from deepseek_jax.plan.memory import BYTES, Training, row_bytes
from deepseek_jax.plan.wire import expert_wire as exchange_traffic
from deepseek_jax.plan.wire import parameter_wire
from deepseek_jax.plan.wire.context_wire import Cut, context_moved
from deepseek_jax.plan.wire.rings import LinkTraffic, StepInputs, link_of, ring
from deepseek_jax.plan.wire.tensor_wire import layer_sums, uncounted


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Holds what a device of the busiest pipeline rank sends in a step."""

  wires: tuple[LinkTraffic, ...]

  def on(self, link: str, purpose: str = '') -> int:
    """Returns the bytes over one kind of link.

    Args:
      link: 'fast' or 'slow'.
      purpose: how the names of the purposes begin that count.
    """
    return sum(
      w.bytes
      for w in self.wires
      if w.link == link and w.purpose.startswith(purpose)
    )


def rows_sent(
  moe: MoEConfig, expert: int, node: int, node_limited: bool
) -> dict[str, Fraction]:
  """Returns copies of one token that cross each link on the way to experts.

  Flat: one copy per chosen expert of another device; of these, those of other
  nodes cross the slow link. Node-limited (V3, section 3.2.2): one copy per node
  at most, to the device of the same place, then over fast links to the experts'
  devices. Mean over even loads; nodes at the router's limit. `node`: devices of
  the expert axis that share one.
  """
  inside = min(expert, node)
  nodes = -(-expert // node)
  K = Fraction(moe.top_k)
  away = Fraction(nodes - 1, nodes)
  if not node_limited or nodes == 1:
    fast = K * Fraction(inside - 1, expert)
    return {'fast': fast, 'slow': K * away}
  limited = getattr(moe.router, 'groups', 1) > 1
  most = min(moe.top_k, moe.router.top_groups if limited else nodes, nodes)
  return {
    'fast': K * Fraction(inside - 1, inside),
    'slow': most * away,
  }


def _mixtures(config: TransformerConfig) -> list[tuple[MoEConfig, int, bool]]:
  """Returns (experts, layers, whether the backward pass reruns them forward).

  Policies 'dots' and 'full' are alike: an exchange is not a plain matmul.
  """
  again = config.compute.remat != 'none'
  made = [(b.ffn, repeat, again) for b, repeat in blocks(config)]
  if config.mtp.depth:
    # Prediction is not recomputed.
    made.append((config.block(config.mtp.block).ffn, config.mtp.depth, False))
  return [m for m in made if isinstance(m[0], MoEConfig)]


def _experts(step: StepInputs, node_limited: bool) -> list[LinkTraffic]:
  """Counts dispatch and combine of experts, by link."""
  if step.mesh.expert == 1:
    return []
  D, training = step.config.dim, step.training
  there = row_bytes(D, training.dispatch)
  back = row_bytes(D, 'bfloat16')
  # Neighbours on the expert axis lie as far apart as faster axes are long.
  near = max(1, step.node // (step.mesh.tensor * step.mesh.context))
  total = {'dispatch': {}, 'combine': {}}
  for moe, repeat, again in _mixtures(step.config):
    rows = rows_sent(moe, step.mesh.expert, near, node_limited)
    for link, copies in rows.items():
      often = copies * step.tokens * repeat * step.layers
      # Results combined from another node are summed unweighted: gradients
      # need no weights, so they are not recomputed.
      added = link == 'slow' and node_limited
      sizes = {
        'dispatch': (2 + again) * there,
        'combine': (2 + again * (not added)) * back,
      }
      for kind, size in sizes.items():
        total[kind][link] = total[kind].get(link, 0) + often * size
  path = 'one copy per node' if node_limited else 'one copy per expert'
  passes = 'forward and backward'
  if step.config.compute.remat != 'none':
    passes += ', and forward again where the backward pass recomputes'
  how = {
    'dispatch': f'{path}, {training.dispatch}, {passes}',
    'combine': f'{path}, bfloat16, {passes}',
  }
  return [
    LinkTraffic(f'expert {kind}', link, int(sent), how[kind])
    for kind, links in total.items()
    for link, sent in links.items()
    if sent
  ]


def _activations(step: StepInputs) -> list[LinkTraffic]:
  """Counts what tensor, context and stage axes send of activations."""
  config, mesh = step.config, step.mesh
  width = BYTES[config.compute.products]
  out = []
  if mesh.tensor > 1:
    out.append(_tensor(step, width))
  if mesh.context > 1:
    out += _context(step, width)
  if mesh.stage > 1:
    how = 'one activation forward and one gradient backward per token'
    streams = getattr(config.residual, 'streams', 1)
    if streams > 1:
      how += f' in each of {streams} streams'
    sent = 2 * step.tokens * streams * config.dim * width
    out.append(LinkTraffic('stages', link_of(step, ('stage',)), sent, how))
  return out


def _tensor(step: StepInputs, width: int) -> LinkTraffic:
  """Counts the all-reduces of tensor parallelism."""
  config, n, uses = step.config, step.mesh.tensor, 1 + step.config.mtp.depth
  forward = 1 if config.compute.remat == 'none' else 2
  every = [
    (repeat * step.layers, layer_sums(block, config.dim, forward))
    for block, repeat in blocks(config)
  ]
  if config.mtp.depth:
    mtp = config.block(config.mtp.block)
    every.append((config.mtp.depth, layer_sums(mtp, config.dim, 1)))
  # Lookups in a sharded vocabulary, and the head's gradient of its input.
  size = width * (
    uses * 2 * config.dim + sum(often * both[0] for often, both in every)
  )
  # float32 per token of the softmax: maximum, sum of exponentials, label.
  size += 4 * (uses * 3 + sum(often * both[1] for often, both in every))
  how = (
    'all-reduces: forward of the outputs of row-sharded matrices, backward of'
    ' the input gradients of column-sharded ones, and of the sharded'
    ' vocabulary: 2 (n-1)/n each'
  )
  if missing := uncounted(config):
    how += f'; NOT COUNTED: sums inside {", ".join(missing)}'
  sent = 2 * ring(n, int(step.tokens * size))
  return LinkTraffic('tensor', link_of(step, ('tensor',)), sent, how)


def _context(step: StepInputs, width: int) -> list[LinkTraffic]:
  """Counts what sequence shards gather of each other, by kind."""
  config, n = step.config, step.mesh.context
  length = step.training.seq_len // n
  cut = Cut(length, n, width, heads=step.mesh.tensor)
  # Without remat the backward pass keeps what was gathered.
  forward = 1 if config.compute.remat == 'none' else 2
  every = [
    (repeat * step.layers, context_moved(block.attention, cut).sent(n, forward))
    for block, repeat in blocks(config)
  ]
  if config.mtp.depth:
    # Prediction must not leave documents, and is not recomputed.
    mtp = config.block(config.mtp.block).attention
    moved = context_moved(mtp, cut._replace(documents=True))
    every.append((config.mtp.depth * step.layers, moved.sent(n, 1)))
  sequences = step.tokens // length
  sent, fixed = (
    int(sequences * sum(often * both[i] for often, both in every))
    for i in range(2)
  )
  how = (
    "all-gather of all sequence shards' keys and values (or latents), reduce-"
    'scatter of their gradients, gathered again where the backward pass'
    ' recomputes: (n-1)/n each; windows and blocks that cross a border of'
    ' shards fetch only the tokens that they lack'
  )
  link = link_of(step, ('context',))
  out = [LinkTraffic('context', link, sent, how)]
  if fixed:
    how = (
      'positions and document numbers; an upper bound, as layers may share them'
    )
    out.append(LinkTraffic('context positions', link, fixed, how))
  return out


def exchange_sent(
  config: TransformerConfig,
  exchange: ExchangeConfig,
  *,
  devices: int,
  tokens: int,
) -> int:
  """Returns the bytes that one device sends by expert exchanges of a step.

  Counted is what the compiled program sends in first rounds, filler included;
  `traffic` counts the rows of even loads alone. The numbers of their experts
  and, to another node, weights travel with the rows.

  Args:
    config: a model.
    exchange: 'all_to_all' or 'two_hop'.
    devices: size of the expert axis.
    tokens: how many one device holds.
  """
  if exchange.kind not in ('all_to_all', 'two_hop'):
    raise InputError(
      f"exchange.kind = {exchange.kind!r}: must be 'all_to_all' or 'two_hop'"
    )
  form = lambda name: formats.row_bytes(
    config.dim, name, config.compute.products
  )
  there, back = form(exchange.dispatch), form(exchange.combine)
  total = 0
  for moe, repeat, again in _mixtures(config):
    sizes = tokens, moe.top_k, moe.experts, devices
    rows = exchange_traffic.buffers(exchange, *sizes)
    # int32 experts of a row; across nodes K of them, and K float32 weights
    # with a gradient. What another node combined is not recomputed.
    each = 2 * (there + back)
    fast = each + 4 + again * (there + back + 4)
    slow = each + 12 * moe.top_k + again * (there + 8 * moe.top_k)
    total += repeat * (rows['fast'] * fast + rows['slow'] * slow)
  return total


def traffic(
  config: TransformerConfig,
  mesh: Mesh,
  training: Training,
  *,
  batch: int,
  node: int = 8,
  node_limited: bool = True,
  held: Mapping | None = None,
) -> Traffic:
  """Counts the bytes that one device sends in one training step.

  Args:
    config: a model.
    mesh: axis sizes.
    training: sequence length, micro-batch, dtypes, ZeRO stage.
    batch: sequences of the global batch.
    node: devices joined by fast links.
    node_limited: experts' tokens cross to each node at most once.
    held: `mesh.shares` of other rules, or to save computing them again.
  """
  held = meshes.shares(config, mesh) if held is None else held
  places = meshes.ranks(config, mesh, both_ends=training.both_ends)
  sizes = [sum(s.elements for p in mine for s in held[p]) for mine in places]
  flat = [s for p in places[sizes.index(max(sizes))] for s in held[p]]
  tokens = batch * training.seq_len // (mesh.batch * mesh.context)
  micro = -(-batch // (mesh.batch * training.micro_batch))
  share = Fraction(1, mesh.stage)
  step = StepInputs(config, mesh, training, tokens, micro, node, share)
  return Traffic(
    (
      *parameter_wire.gradients(step, flat),
      *parameter_wire.fsdp(step, flat),
      *_experts(step, node_limited),
      *_activations(step),
    )
  )
