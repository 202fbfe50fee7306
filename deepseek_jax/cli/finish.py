"""Ends a run: held-out bits per byte, samples, balance, the report."""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_jax import say
from deepseek_jax.errors import InputError
from deepseek_jax.infer import sampling as sample
from deepseek_jax.plan import count_flops, count_parameters
from deepseek_jax.record import flight, load_balance, metrics, results, writers
from deepseek_jax.record.report.page import Sample, write_report
from deepseek_jax.run.checkpoint import flatten
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.fit import Run
from deepseek_jax.run.folder import as_json
from deepseek_jax.run.held_out import held_out

HELD_OUT = 'heldout_bits_per_byte'  # in metrics.jsonl
_NEW_TOKENS = 96
_HEAD = re.compile(r'^ *def \w+\(.*\):\n', re.MULTILINE)


def finish(run: Run, workdir: Path, *, quiet: bool = False) -> None:
  """Prints what the run reached; writes results.json and report.html.

  Args:
    run: as `fit` returns it.
    workdir: its folder.
    quiet: prints the held-out bits per byte and the report's path alone.
  """
  console = Console()
  before = _written(workdir)
  reached = _with_earlier(results_of(run, workdir), before)
  # What was measured of it before stays: each entry names its step.
  name = results.EVALUATIONS
  measured = {name: before[name]} if name in before else {}
  results.write(workdir, reached | measured)
  keep_in_metrics(run, workdir, reached)
  facts = facts_of(reached) | size_facts(run)
  samples = write_samples(run)
  if quiet:
    console.quiet = True
  for item in samples:
    console.rule(item.kind)
    console.print(item.prompt, style='dim', markup=False, highlight=False)
    console.print(item.text, markup=False, highlight=False)
  console.rule('results')
  balance = _balance_table(workdir)
  if balance:
    console.print(balance)
  report = _shown(console, workdir, facts, samples)
  console.quiet = False
  if quiet:
    for name in list(facts)[:1]:
      console.print(f'{name}: {facts[name]:.3f}', highlight=False)
  console.print(f'report: {report.absolute()}', soft_wrap=True)


def conclude(
  workdir: Path, facts: Mapping[str, Any], samples: Sequence[Sample] = ()
) -> None:
  """Prints what a run reached and writes workdir/report.html."""
  console = Console()
  console.rule('results')
  report = _shown(console, workdir, facts, samples)
  console.print(f'report: {report.absolute()}', soft_wrap=True)


def _shown(
  console: Console,
  workdir: Path,
  facts: Mapping[str, Any],
  samples: Sequence[Sample],
) -> Path:
  """Prints facts and writes the report; returns its path."""
  for name, value in facts.items():
    shown = f'{value:.3f}' if isinstance(value, float) else f'{value:,}'
    console.print(f'{name}: {shown}', markup=False, highlight=False)
  return write_report(
    workdir, title=f'Run {workdir.name}', facts=facts, samples=samples
  )


def _written(workdir: Path) -> dict[str, Any]:
  """Returns what a results.json holds; a damaged one is set aside."""
  try:
    return results.whole(workdir) or {}
  except InputError as error:
    say.warn(f'{error}; it is now {metrics.set_aside(workdir / results.FILE)}')
    return {}


def _with_earlier(
  reached: dict[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns results with speed and memory of earlier launches.

  A launch that finds all done, or compiles for one step more, has no speed of
  its own and needs less memory than the run did.
  """
  devices = lambda one: {**one.get('machine', {}), 'ended': None}
  if not before or devices(before) != devices(reached):
    return reached
  speed, memory = 'tokens_per_second', 'peak_memory_bytes'
  peaks = filter(None, (reached[memory], before.get(memory)))
  return {
    **reached,
    speed: reached[speed] or before.get(speed),
    memory: max(peaks, default=None),
  }


def results_of(run: Run, workdir: Path) -> dict[str, Any]:
  """Returns what the run reached, as results.json holds it."""
  return {'heldout': held_out(run), **spent_by(run, workdir)}


def spent_by(run: Run, workdir: Path) -> dict[str, Any]:
  """Returns what a run cost and read, as results.json holds it."""
  config, state = run.config, run.state
  count = count_parameters(config.model)
  tokens = int(state.sequences) * config.data.seq_len
  store = run.store
  return {
    'steps': int(state.step),
    'tokens': tokens,
    'skipped_updates': int(state.gate.skipped),
    'seconds': _seconds(workdir),
    'tokens_per_second': run.tokens_per_second,
    'parameters': {'total': count.total, 'active': count.active},
    'flops': _flops(config, tokens),
    'peak_memory_bytes': results.peak_memory(),
    'seed': config.seed,
    'data': {
      'paths': list(config.data.paths),
      'corpus_sha256': store.index['recipe']['corpus_sha256'],
      'train_sha256': store.train_sha256,
      'heldout_sha256': store.heldout_sha256,
    },
    'versions': results.versions(),
    'machine': results.machine(),
    'git': results.git_state(Path(__file__).parent),
    'git_of_working_folder': results.git_state(Path.cwd()),
  }


def _flops(config: RunConfig, tokens: int) -> dict[str, float] | None:
  """Returns the FLOPs of a run; None of layers that the planner doesn't know.

  Those are of a user's own classes.
  """
  try:
    made = count_flops(config.model, config.data.seq_len, mtp=True)
  except InputError:
    return None
  return {'training': made.per_token * tokens, 'per_token': made.per_token}


def _seconds(workdir: Path) -> float:
  """Returns the seconds of all launches of a run, by its timeline."""
  path = workdir / 'timeline.jsonl'
  lines = path.read_text('utf-8').splitlines() if path.exists() else []
  return math.fsum(json.loads(line)['seconds'] for line in lines)


def keep_in_metrics(run: Run, workdir: Path, reached: dict) -> None:
  """Writes the last validation as a line of metrics, once."""
  step = int(run.state.step)
  if not reached['heldout'] or any(
    row['step'] == step and HELD_OUT in row for row in metrics.read(workdir)
  ):
    return
  last = {HELD_OUT: reached['heldout']['bits_per_byte']}
  others = []
  if run.config.tensorboard:
    others.append(writers.TensorBoard(workdir, None))
    others[0].hparams(flatten(as_json(run.config)), last)
  if run.config.wandb:
    plain = as_json(run.config)
    others.append(writers.WandB(workdir, run.config.wandb, plain))
  with metrics.MetricsWriter(workdir, console=False, writers=others) as writer:
    writer.write(step, last)


def facts_of(reached: dict) -> dict[str, float | int]:
  """Returns bits per byte of model and baselines, as the report shows them."""
  held = reached['heldout']
  if not held:
    return {}
  names = {
    'uniform': 'uniform guess, bits per byte',
    'unigram': 'unigram guess, bits per byte',
    'xz': 'xz -9 bits per byte',
    'xz primed': 'xz -9 after the training text',
    'zstd primed': 'zstd after the training text',
  }
  return {
    'held-out bits per byte': held['bits_per_byte'],
    **{names[name]: value for name, value in held['baselines'].items()},
    'held-out files': held['documents'],
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
