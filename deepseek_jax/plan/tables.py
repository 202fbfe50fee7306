"""Shows plans as tables on the terminal, several side by side."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from deepseek_jax.plan.compiled import Compiled, Program
from deepseek_jax.plan.device_shares import AXES
from deepseek_jax.plan.flops import CONVENTIONS
from deepseek_jax.plan.kernel_choices import Chosen
from deepseek_jax.plan.memory import CLASSES
from deepseek_jax.plan.report import POLICIES, Report

Row = tuple[str, Callable[[Any], str]]


def gigabytes(n: float) -> str:
  """Returns n bytes as text, in GB of 10^9."""
  return f'{n / 1e9:,.2f} GB'


def seconds(s: float) -> str:
  """Returns a time as text, three digits below 100 s."""
  return f'{s:#.3g} s' if s < 100 else f'{s:,.0f} s'


def _table(title: str, rows: list[Row], reports: Mapping[str, Any]) -> Table:
  """Returns a table with a column per report and a row per figure."""
  table = Table(title=title, title_justify='left', title_style='bold')
  table.add_column('')
  for name in reports:
    table.add_column(name, justify='right')
  for label, show in rows:
    table.add_row(label, *(show(r) for r in reports.values()))
  return table


def _model() -> list[Row]:
  """Returns the rows on the model alone: parameters, FLOPs, KV cache."""
  giga = lambda n: f'{n / 1e9:,.3f} G'
  standard = lambda i: (
    lambda r: giga(r.standard_flops[i]) if r.standard_flops else '-'
  )
  fp8 = lambda r: f'{r.cache.fp8:,}' if r.cache.fp8 is not None else '-'
  p = lambda field: lambda r: f'{getattr(r.parameters, field):,}'
  return [
    ('parameters', p('total')),
    ('active per token, with embedding and head', p('active')),
    ('active per token, without embedding', p('active_without_embedding')),
    ('multi-token prediction alone', p('mtp')),
    *(
      (
        f'training FLOPs per token: {CONVENTIONS[seen]}',
        lambda r, seen=seen: giga(r.flops[seen].per_token),
      )
      for seen in ('half', 'full', 'triangle')
    ),
    ('  72 L D² + 6 D V (dense models)', standard(0)),
    ('  72 L D² + 12 L D s + 6 D V', standard(1)),
    ('KV cache per token: numbers', lambda r: f'{r.cache.elements:,}'),
    ('KV cache per token: bytes, bfloat16', lambda r: f'{r.cache.bf16:,}'),
    ('KV cache per token: bytes, 8-bit records', fp8),
    (
      'KV cache per token: bytes, as configured',
      lambda r: f'{r.cache.configured:,}',
    ),
    (
      'KV cache of a long sequence, bfloat16',
      lambda r: (
        f'{r.cache_at_length.length:,} tokens: '
        + gigabytes(r.cache_at_length.bf16)
      ),
    ),
    (
      'KV cache of it, 8-bit records',
      lambda r: (
        gigabytes(r.cache_at_length.fp8)
        if r.cache_at_length.fp8 is not None
        else '-'
      ),
    ),
    (
      'decoding a token after it, by form',
      lambda r: ', '.join(f'{k} {giga(v)}' for k, v in r.decode.items()),
    ),
  ]


def _device() -> list[Row]:
  """Returns the rows on the memory of the fullest device."""
  classes = [
    (f'  {c}', lambda r, c=c: gigabytes(r.memory[r.policy][c])) for c in CLASSES
  ]
  total = lambda policy: lambda r: gigabytes(sum(r.memory[policy].values()))
  limit = lambda r: (
    gigabytes(r.cluster.accelerator.memory.value)
    + (' (fits)' if r.fits else ' (too small)')
  )
  return [
    *((f'remat {p}: all classes', total(p)) for p in POLICIES),
    ('of these as configured', lambda r: f'remat {r.policy}'),
    *classes,
    ('memory of the device', limit),
  ]


def _step() -> list[Row]:
  """Returns the rows on the time of a step."""
  t = lambda field: lambda r: seconds(getattr(r.time, field))
  return [
    ('compute at the peak', t('compute')),
    ('pipeline bubble', t('bubble')),
    ('optimizer update', t('update')),
    ('fast links', t('fast')),
    ('slow links', t('slow')),
    ('  dispatch and combine, on both', t('exchange')),
    ('  of these exposed, at most', t('exposed')),
    ('least: everything overlaps', t('least')),
    ('most: nothing overlaps', t('most')),
    (
      'planned',
      lambda r: (
        f'{seconds(r.time.planned)} at {r.recipe.utilization:.1%}'
        + ('' if r.time.reachable else ': below the least')
      ),
    ),
  ]


def _run() -> list[Row]:
  """Returns the rows on the whole run: tokens, cost, checkpoint."""
  wait = lambda r: seconds(r.checkpoint.seconds)
  return [
    ('tokens', lambda r: f'{r.recipe.tokens:,.0f}'),
    ('steps', lambda r: f'{r.cost.steps:,}'),
    ('device-hours', lambda r: f'{r.cost.device_hours:,.0f}'),
    ('days', lambda r: f'{r.cost.days:,.1f}'),
    ('dollars', lambda r: f'{r.cost.dollars:,.0f}'),
    ('checkpoint', lambda r: gigabytes(r.checkpoint.bytes)),
    (
      'writing it',
      lambda r: (
        f'{wait(r)} of {r.recipe.grace:g} s grace'
        + ('' if r.checkpoint.in_time else ': too slow')
      ),
    ),
  ]


def _rollouts() -> list[Row]:
  """Returns the rows on rounds of rollouts."""
  time = lambda field: lambda c: seconds(getattr(c, field))
  each = lambda c: f'{c.published.seconds:.3g} {c.published.device}-seconds'
  return [
    ('answers of a round', lambda c: f'{c.round.answers:,}'),
    ('tokens that they have', lambda c: f'{c.tokens:,}'),
    ('  decoded together', lambda c: f'{c.round.together:,}'),
    ('KV caches of these, of a device', lambda c: gigabytes(c.cache_bytes)),
    (
      'memory with these, the reference, the weights sampled from',
      lambda c: (
        gigabytes(c.held_bytes) + (' (fits)' if c.fits else ' (too small)')
      ),
    ),
    ('a token for each of these', time('decode_step')),
    ('decoding', time('decode')),
    ('prefill', time('prefill')),
    ('log-probs of old policy and reference', time('scoring')),
    ('updates', lambda c: f'{c.round.updates}: {seconds(c.update)}'),
    ('a round', time('seconds')),
    ('rounds of the run', lambda c: f'{c.round.rounds:,}'),
    ('device-hours with sampling', lambda c: f'{c.device_hours:,.3g}'),
    ('dollars with sampling', lambda c: f'{c.dollars:,.3g}'),
    ('an answer of R1-Zero, as published', each),
    (
      "rounds that R1-Zero's device-hours would pay for",
      lambda c: f'{c.budget:,.0f}',
    ),
  ]


def _wires(report: Report) -> Table:
  """Returns the table of what a device sends per step, by purpose."""
  title = 'Sent by a device per step'
  table = Table(title=title, title_justify='left', title_style='bold')
  for name in ('purpose', 'link', 'bytes', 'how'):
    table.add_column(name, justify='right' if name == 'bytes' else 'left')
  for w in report.traffic.wires:
    table.add_row(w.purpose, w.link, f'{w.bytes:,}', w.formula)
  return table


def render(reports: Mapping[str, Report]) -> Group:
  """Renders plans by name as one Group; assumptions are the first one's."""
  first = next(iter(reports.values()))
  sampled = {n: r.rollouts for n, r in reports.items() if r.rollouts}
  parts = [
    _table('Model', _model(), reports),
    _table('Memory of the fullest device', _device(), reports),
    *(_wires(r) for r in reports.values() if r.traffic.wires),
    _table('Seconds of a step', _step(), reports),
    _table('Run', _run(), reports),
    *([_table('Rollouts', _rollouts(), sampled)] if sampled else []),
    *(
      Text(f'WARNING: {name}: {warning}')
      for name, r in reports.items()
      for warning in r.warnings
    ),
    Text('Assumptions\n' + '\n'.join(f'- {a}' for a in first.assumptions)),
  ]
  return Group(*parts)


def render_kernels(name: str, program: Program, chosen: list[Chosen]) -> Group:
  """Renders which operations run as kernels, and why others do not."""
  table = Table(title='Operations by phase', title_justify='left')
  for column in ('phase', 'operation', 'runs as', 'calls', 'arrays'):
    table.add_column(column, justify='right' if column == 'calls' else 'left')
  for c in chosen:
    how = {'gpu': 'kernel', 'tpu': 'kernel', 'cudnn': 'cuDNN'}.get(c.impl)
    how = how or f'XLA: {c.reason or "asked for"}'
    table.add_row(c.phase, c.op, how, str(c.times), c.shapes)
  without = sorted({c.op for c in chosen if c.impl == 'reference'})
  note = (
    f'{name}: traced on {program.mesh.spread}, {program.micro_batch} x'
    f' {program.seq_len} tokens per device; '
  )
  note += (
    f'without a kernel: {", ".join(without)}'
    if without
    else ('every operation that has a kernel runs as one')
  )
  return Group(table, Text(note))


def render_compiled(name: str, program: Program, made: Compiled) -> Group:
  """Renders what XLA made of a training step, and its warnings."""
  grid, compute = program.mesh, program.model.compute
  axes = [f'{a} {getattr(grid, a)}' for a in AXES if getattr(grid, a) > 1]
  layers = 'scanned' if compute.scan else 'unrolled'
  what = (
    f'{name}: one training step, all {program.model.layers} layers ({layers}),'
    f' {compute.products}, remat {compute.remat}; {program.micro_batch} x'
    f' {program.seq_len} tokens per device on {grid.devices} devices'
    f' ({", ".join(axes) or "no axis"}); experts by {grid.exchange.kind};'
    f' lowered and compiled in {seconds(made.seconds)}'
  )
  held = Table(title='Compiled: bytes per device', title_justify='left')
  for column in ('', 'bytes'):
    held.add_column(column, justify='right' if column else 'left')
  for label, size in (
    ('arguments', made.arguments),
    ('  of these training state', made.state),
    ('outputs (the state in place of the old one)', made.outputs),
    ('temporaries, as the CPU backend would need them', made.temporaries),
  ):
    held.add_row(label, f'{size:,}')
  sent = Table(title='Compiled: collectives of a step', title_justify='left')
  for column in ('kind', 'times', 'bytes sent by a device'):
    sent.add_column(column, justify='left' if column == 'kind' else 'right')
  for found, note in ((made.collectives, ''), (made.maybe, ', if needed')):
    for kind, total in found.items():
      sent.add_row(kind + note, f'{total.count:,}', f'{total.sent:,}')
  notes = [what]
  if made.loops:
    notes.append(
      f'{made.loops} collectives are in loops of unknown length: counted once'
    )
  if made.rematerialized:
    notes.append(
      f'WARNING: {len(made.rematerialized)} involuntary full'
      ' rematerializations (arrays gathered whole between two shardings):'
    )
  for warning in sorted(set(made.rematerialized)):
    notes.append(f'  {made.rematerialized.count(warning)} x {warning}')
  if not made.rematerialized:
    notes.append('no involuntary full rematerialization')
  return Group(held, sent, Text('\n'.join(notes)))
