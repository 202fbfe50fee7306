"""Writes folders of runs that never were, with hostile names and texts."""

import json

import numpy as np

from deepseek_jax.record import metrics, routing
from deepseek_jax.record.metric import Metric, describe
from deepseek_jax.record.report import page

HOSTILE = (
  '</pre></script><script>window.hit=1</script>'
  '<img src=x onerror="window.hit=1">"\' onfocus=window.hit=1 $x_$&'
)


def write_scalars(workdir, steps, scale=1.0):
  known = {
    'loss': Metric('Loss', 'nats per token'),
    'grad_norm': Metric('Gradient norm'),
  }
  describe(workdir, known)
  with metrics.MetricsWriter(workdir, console=False) as writer:
    for step in range(1, steps + 1):
      row = {
        'loss': scale * 5 / step,
        'grad_norm': 1.0 + step % 3,
        HOSTILE: 1.0,
      }
      writer.write(step, row, {'tokens_per_second': 1e4 + step})
    writer.write(steps, {'validation_loss': scale * 5.5 / steps})


def write_routing(workdir, steps, L=3, E=8, together=False):
  rng = np.random.default_rng(0)
  reduce = {'load': 'sum', 'bias': 'last', 'gate_entropy': 'mean'}
  recorder = routing.FlightRecorder(
    workdir / 'routing.npz',
    reduce,
    capacity=64,
    layers=range(1, L + 1),
    coarse={'together': 'sum'} if together else None,
  )
  for step in range(1, steps + 1):
    load = rng.integers(0, 100, (L, E))
    load[:, 0] = 0
    bias = rng.normal(size=(L, E)).astype(np.float32)
    pairs = {'together': rng.integers(1, 9, (L, E, E))} if together else {}
    recorder.record(
      step, load=load, bias=bias, gate_entropy=rng.random(L), **pairs
    )
  recorder.save()


def write_run(workdir, steps, scale=1.0, routing=True, together=False):
  write_scalars(workdir, steps, scale)
  if routing:
    write_routing(workdir, steps, together=together)
  lines = [('step', 6.0), ('compile', 3.0), ('step', 1.0)]
  rows = [json.dumps({'phase': p, 'seconds': s}) + '\n' for p, s in lines]
  (workdir / 'timeline.jsonl').write_text(''.join(rows))
  (workdir / 'config.json').write_text(json.dumps({'name': HOSTILE}))


def write_report(workdir):
  """Writes the report of a run with hostile texts; returns its path."""
  return page.write_report(
    workdir,
    title='A run ' + HOSTILE,
    facts={
      'bits per byte': 1.23456,
      'parameters': 26141184,
      HOSTILE: HOSTILE,
    },
    samples=[
      page.Sample('Once ' + HOSTILE, ' upon\n a \x00 \ud800 time', HOSTILE),
      page.Sample('y' * 300, 'z' * 300, 'k' * 200),
    ],
    notes=[HOSTILE, 'n' * 300],
  )
