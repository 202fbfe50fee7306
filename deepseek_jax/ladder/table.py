"""Writes what a ladder found as Markdown."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def bytes_text(size: float) -> str:
  """Returns bytes for people."""
  for unit, one in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if size >= one:
      return f'{size / one:,.3g} {unit}'
  return f'{size:,.0f} B'


def count_text(number: float) -> str:
  """Returns a large number for people."""
  for unit, one in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if number >= one:
      return f'{number / one:,.3g} {unit}'
  return f'{number:,.0f}'


def ratio_text(reach: Mapping | None) -> str:
  """Returns compute to the goal, with its interval."""
  if reach is None:
    return 'never'
  if reach['low'] == reach['high']:
    return '1'
  mark = '' if reach['measured'] else ' *'
  return (
    f'{reach["ratio"]:.2f} ({reach["low"]:.2f} to {reach["high"]:.2f}){mark}'
  )


def counted(found: Mapping, rung: str) -> float | None:
  """Returns a rung's compute to the goal with its optimizer's own products.

  None where the optimizer has none, or the goal was not reached.
  """
  reach, share = (
    found['reach'].get(rung),
    found['rungs'][rung]['plan']['update'],
  )
  return reach['ratio'] * (1 + share) if reach and share else None


def verdict(found: Mapping, below: str, rung: str) -> str:
  """Returns whether a rung pays over the one below, at the smallest budget."""
  each = found['differences'].get(rung)
  if each is None or each['below'] != below:
    return ''
  if each['half'] is None:
    return f'{each["mean"]:+.3f}, one seed'
  told = abs(each['mean']) > each['half']
  what = 'not told from 0'
  if told:
    what = 'better' if each['mean'] < 0 else 'worse'
  return f'{each["mean"]:+.3f} ± {each["half"]:.3f}: {what}'


def reach_table(found: Mapping[str, Any]) -> str:
  """Returns a row for each rung: losses, compute to the goal, what it costs."""
  budgets = sorted(found['size']['budgets'])
  head = ['rung', 'generation', 'rate']
  head += [f'{b:.2g} FLOPs' for b in budgets]
  head += [f'compute to the last loss of {found["first"]}', 'FLOPs / token']
  rows = []
  for rung, told in found['rungs'].items():
    means = budget_means(found, rung)
    cells = [f'{m:.3f}' if m is not None else '—' for m in means]
    rows.append(
      [
        rung,
        told['generation'],
        f'{told["rate"]:g}',
        *cells,
        _with_optimizer(found, rung),
        count_text(told['plan']['training']),
      ]
    )
  return _rows(head, rows)


def _with_optimizer(found: Mapping, rung: str) -> str:
  """Returns the text of a rung's compute, and of what it is in all."""
  text, whole = ratio_text(found['reach'].get(rung)), counted(found, rung)
  return text if whole is None else f'{text}; {whole:.2f} with the optimizer'


def budget_means(found: Mapping, rung: str) -> list[float | None]:
  """Returns the mean bits per byte of a rung at each budget, over seeds."""
  out = []
  mine = [p for p in found['points'] if p['arm'] == rung]
  for budget in sorted(found['size']['budgets']):
    at = [p['loss'] for p in mine if abs(p['flops'] / budget - 1) < 0.05]
    out.append(sum(at) / len(at) if at else None)
  return out


def _steps_table(found: Mapping) -> str:
  """Returns a row for each step: what changes, and what it did."""
  rungs = list(found['rungs'])
  rows = []
  for below, rung in itertools.pairwise(rungs):
    rows.append(
      [
        f'{below} → {rung}',
        found['rungs'][rung]['idea'],
        verdict(found, below, rung),
        _times(found['reach'].get(rung), found['reach'].get(below)),
      ]
    )
  head = [
    'step',
    'what changes',
    'bits per byte at the smallest budget, paired by seed',
    'compute, times that of the rung below',
  ]
  return _rows(head, rows)


def _times(now: Mapping | None, before: Mapping | None) -> str:
  """Returns the compute of a rung over that of the one below."""
  if now is None or before is None:
    return '—'
  return f'{now["ratio"] / before["ratio"]:.2f}'


def _tried(found: Mapping) -> list[str]:
  """Returns the section on rates; nothing where there was no choice."""
  if len(found['size']['rates']) == 1:
    return []
  rates = sorted(
    {float(r) for t in found['rungs'].values() for r in t['tried']}
  )
  rows = []
  for rung, told in found['rungs'].items():
    if not told['tried']:
      continue
    each = {float(rate): loss for rate, loss in told['tried'].items()}
    cells = [f'{each[r]:.3f}' if r in each else '—' for r in rates]
    at = rates.index(told['rate']) if told['rate'] in rates else None
    if at is not None:
      cells[at] = f'**{cells[at]}**'
    edge = len(rates) > 1 and at in (0, len(rates) - 1)
    rows.append([rung, *cells, 'at the edge' if edge else ''])
  return [
    '## Learning rates',
    'Training loss of the last fifth at the smallest budget; the chosen rate is'
    ' bold.',
    _rows(['rung', *(f'{r:g}' for r in rates), ''], rows),
  ]


def _plan_table(plans: Mapping[str, Mapping], memory: bool) -> str:
  """Returns what the planner says of each rung."""
  head = [
    'rung',
    'parameters',
    'active',
    'training FLOPs / token',
    'FLOPs / decoded token',
    'cache',
  ]
  head += ['memory of a step'] * memory
  rows = []
  for rung, plan in plans.items():
    cells = [count_text(plan[n]) for n in ('parameters', 'active', 'training')]
    cells += [count_text(plan['decode']), bytes_text(plan['cache'])]
    cells += [bytes_text(plan['training_bytes'])] if memory else []
    rows.append([rung, *cells])
  return _rows(head, rows)


def _free(found: Mapping) -> list[str]:
  """Returns what no budget has paid for: the optimizer's own arithmetic."""
  shares = {n: t['plan']['update'] for n, t in found['rungs'].items()}
  return [
    f"Not in any budget: Muon's iterations in `{name}` take {share:.2f} times"
    ' the FLOPs of a step of so few tokens (see its row for the compute with'
    ' them); their number does not grow with the batch, so at published ones'
    ' they are few.'
    for name, share in shares.items()
    if share
  ]


def _published(found: Mapping) -> list[str]:
  """Returns the section on published widths; nothing without one."""
  if 'published' not in found:
    return []
  context = next(iter(found['published'].values()))['context']
  return [
    "## The same steps at V3's and V4's published widths, by the planner",
    'Not trained: width 7,168, 61 layers, windows of 4,096 tokens; a token'
    f' decoded behind {context:,} tokens, and their cache in bfloat16. Matmuls'
    " count; the optimizer's own arithmetic does not, so Muon looks free.",
    _plan_table(found['published'], False),
  ]


def _rates(size: Mapping) -> str:
  """Returns how the learning rates were chosen."""
  if len(size['rates']) == 1:
    return f'It is {size["rates"][0]:g} for all rungs; none was tuned.'
  on = ', '.join(f'`{name}`' for name in size['anchors']) or 'every rung'
  others = (
    '; other rungs take that of the one below them' if size['anchors'] else ''
  )
  return (
    f'It was chosen at the smallest budget on {on}{others}: the least training'
    ' loss of the last fifth of the steps, which read text that the model had'
    ' not read before, and none of the held-out files.'
  )


def _how(found: Mapping) -> str:
  """Returns how the runs were made comparable."""
  size, held = found['size'], found['data']['heldout']
  shape = size['shape']
  return (
    f'Size `{found["name"]}`: width {shape["dim"]}, {shape["layers"]} layers,'
    f' {shape["vocab"]:,} tokens of vocabulary, windows of {size["seq_len"]},'
    f' {size["batch"]} a step. Each rung is the one above with one change. A'
    ' budget is training FLOPs by the planner (forward and backward,'
    ' multi-token prediction included), so a rung that costs more a token reads'
    ' fewer tokens; all read the same windows in the same order. Bits per byte'
    f' are of {held["documents"]} held-out files, {held["bytes"]:,} bytes, each'
    ' read by itself. The learning rate is constant after'
    f' {size["warmup"]} steps, so a run through all budgets holds the shorter'
    f' ones. {_rates(size)} {found["runs"]} runs took'
    f' {found["seconds"] / 3600:.2f} hours, on {found["machine"]["platform"]};'
    ' FLOPs and tokens are compared, so seconds change nothing.'
  )


def _fitted(found: Mapping) -> str:
  """Returns what the compute to the goal is, and its interval."""
  fit = found['fit']
  bend = ' + c x²' if fit['bent'] else ''
  common = ' and c in common' if fit['bent'] else ''
  return (
    f'Compute to the last loss of `{found["first"]}` is a share of its largest'
    ' budget, with a 95 % interval: one least-squares fit of ln loss = a + b'
    f' x{bend} + seed, x = ln FLOPs, to all runs, with a and b of each'
    f' rung{common}; {fit["freedom"]} degrees of freedom, scatter'
    f' {100 * fit["scatter"]:.2f} % of a loss. \\* the curve was extended'
    ' beyond what was measured.'
  )


def page(found: Mapping[str, Any], name: str) -> str:
  """Returns the Markdown page of a ladder.

  Args:
    found: of `measured.conclusion`, with 'name' and 'command'.
    name: of its picture, without an ending.
  """
  plans = {rung: told['plan'] for rung, told in found['rungs'].items()}
  lacking = ', '.join(found['lacking'])
  parts = [
    '# From Llama to V4, one idea at a time',
    f'    {found["command"]}',
    f'![{alt_text(found)}]({name}.png)',
    _how(found),
    *([f'Without a curve yet: {lacking}.'] if lacking else []),
    reach_table(found),
    _fitted(found),
    '## Step by step',
    _steps_table(found),
    '## What it costs, by the planner',
    f'A token decoded behind {found["size"]["seq_len"]} tokens, and their cache'
    ' in bfloat16.',
    _plan_table(plans, True),
    *_free(found),
    *_published(found),
    *_tried(found),
    f'Held-out tokens: SHA-256 {found["data"]["heldout_sha256"][:16]}…; jax'
    f' {found["versions"]["jax"]}, Python {found["versions"]["python"]}.',
  ]
  return '\n\n'.join(parts) + '\n'


def alt_text(found: Mapping[str, Any]) -> str:
  """Returns the picture in words, for who can't see it."""
  parts = []
  for rung in found['rungs']:
    parts.append(f'{rung} {ratio_text(found["reach"].get(rung))}')
  return (
    f'Compute that each rung needs for the last loss of {found["first"]}, as a'
    f' share of what {found["first"]} spent: {"; ".join(parts)}'
  )
