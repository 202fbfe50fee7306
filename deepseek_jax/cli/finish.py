"""Ends a run: held-out bits per byte, samples, balance, the report."""

import random
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_jax import data as datalib
from deepseek_jax.infer import sampling as sample
from deepseek_jax.plan import count_parameters
from deepseek_jax.record import flight, load_balance
from deepseek_jax.record.report.page import Sample, write_report
from deepseek_jax.run.fit import Run
from deepseek_jax.train import evaluate

_NEW_TOKENS = 96
_HEAD = re.compile(r'^ *def \w+\(.*\):\n', re.MULTILINE)


def finish(run: Run, workdir: Path) -> None:
  """Prints what the run reached and writes workdir/report.html."""
  console = Console()
  samples = write_samples(run)
  facts = held_out_facts(run) | size_facts(run)
  for item in samples:
    console.rule(item.kind)
    console.print(item.prompt, style='dim', markup=False, highlight=False)
    console.print(item.text, markup=False, highlight=False)
  console.rule('results')
  balance = _balance_table(workdir)
  if balance:
    console.print(balance)
  for name, value in facts.items():
    shown = f'{value:.3f}' if isinstance(value, float) else f'{value:,}'
    console.print(f'{name}: {shown}', markup=False, highlight=False)
  report = write_report(
    workdir, title=f'Run {workdir.name}', facts=facts, samples=samples
  )
  console.print(f'report: {report.absolute()}', soft_wrap=True)


def held_out_facts(run: Run) -> dict:
  """Returns bits per byte of model and xz -9; both read each file by itself."""
  config = run.config
  if not run.store.heldout_documents():
    return {}
  heldout = datalib.Heldout(
    run.store,
    config.data.seq_len,
    config.evaluate.batch,
    stride=config.evaluate.stride,
  )
  bits = evaluate.bits_per_byte(run.model, run.variables, heldout)
  return {
    'held-out bits per byte': bits,
    'uniform guess, bits per byte': datalib.uniform_bits_per_byte(
      heldout, config.model.vocab_size
    ),
    'xz -9 bits per byte': datalib.xz_bits_per_byte(run.store.heldout_texts()),
    'held-out files': len(heldout.documents),
  }


def size_facts(run: Run) -> dict:
  """Returns parameters, training tokens, skipped updates and speed."""
  count = count_parameters(run.config.model)
  facts = {
    'parameters': count.total,
    'active per token': count.active,
    'training tokens': int(run.state.sequences) * run.config.data.seq_len,
    'skipped updates': int(run.state.gate.skipped),
  }
  if run.tokens_per_second:
    facts['tokens per second'] = round(run.tokens_per_second)
  return facts


def _balance_table(workdir: Path) -> Table | None:
  """Returns the expert load per MoE layer over the last recorded interval.

  None where the run recorded no routing.
  """
  path = workdir / 'routing.npz'
  if not path.exists():
    return None
  recorded = flight.load(path)
  load = recorded.arrays['load'][-1].astype(np.float64)
  table = Table(title='expert load, last recorded steps (1.00 = even)')
  for name in ('layer', 'least', 'most', 'MaxVio', 'entropy'):
    table.add_column(name, justify='right')
  for layer, row in zip(recorded.layers, load):
    share = row / row.mean()
    table.add_row(
      str(layer),
      f'{share.min():.2f}',
      f'{share.max():.2f}',
      f'{float(load_balance.max_violation(row)):.2f}',
      f'{float(load_balance.load_entropy(row)):.3f}',
    )
  return table


def write_samples(run: Run) -> list[Sample]:
  """Returns two continuations and one infilling of held-out text."""
  tokenizer = run.store.tokenizer()
  texts = [t for t in run.store.heldout_texts() if len(t) > 600]
  if not texts:
    return []
  rng = random.Random(run.config.seed)
  rng.shuffle(texts)
  texts.sort(key=lambda text: not _HEAD.search(text))  # functions first
  prompts = [_prefix(texts[i % len(texts)], rng) for i in range(3)]
  room = max(run.config.data.seq_len - _NEW_TOKENS, 8)
  rows = [tokenizer.encode(text)[-room:] for text, _ in prompts]
  kinds = ['continuation', 'continuation']
  if tokenizer.fim:
    text, rest = prompts[2]
    tail = rest.split('\n', 4)[-1][:400]
    rows[2] = _infill(tokenizer, text, tail, room)
    prompts[2] = (f'{text}⟦ ? ⟧\n{tail}', '')
    kinds.append('fill in the middle')
  else:
    kinds.append('continuation')
  cfg = sample.SampleConfig(
    temperature=0.7, top_p=0.9, stop=(tokenizer.eos_id,)
  )
  out = sample.sample(
    run.model,
    run.variables,
    rows,
    cfg,
    max_new_tokens=_NEW_TOKENS,
    key=jax.random.key(run.config.seed),
  )
  decoded = [
    tokenizer.decode(tokens[:n][tokens[:n] != tokenizer.eos_id].tolist())
    for tokens, n in zip(out.tokens, out.lengths)
  ]
  return [
    Sample(prompt[-700:], text, kind)
    for (prompt, _), text, kind in zip(prompts, decoded, kinds)
  ]


def _prefix(text: str, rng: random.Random) -> tuple[str, str]:
  """Cuts a document after the head of a function, or else at a line."""
  heads = _HEAD.finditer(text)
  inner = [m.end() for m in heads if 200 < m.end() < len(text) - 200]
  lines = [m.end() for m in re.finditer('\n', text[200:-200])]
  cut = rng.choice(inner or [200 + n for n in lines] or [len(text) // 2])
  return text[:cut], text[cut:]


def _infill(tokenizer: Any, prefix: str, suffix: str, room: int) -> list[int]:
  """Returns the prompt for what lies between two texts, as trained on."""
  marks = tokenizer.fim
  after = tokenizer.encode(suffix)[: room // 3]
  before = tokenizer.encode(prefix)[-(room - len(after) - 3) :]
  return [marks.begin, *before, marks.hole, *after, marks.end]
