"""Tiny runs for faults, and what says that two of them are the same."""

import contextlib
import functools
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax import presets
from deepseek_jax.run import fit as loop
from deepseek_jax.run.checkpoint import flatten
from deepseek_jax.train.schedules import BatchConfig, ScheduleConfig
from deepseek_jax.train.step import TrainConfig

LENGTH, ROWS = 16, 4


def write_corpus(folder: Path) -> None:
  folder.mkdir()
  for i in range(6):
    lines = [f'def f{i}_{j}(x):\n  return x + {j}\n' for j in range(30)]
    (folder / f'part{i}.py').write_text('\n'.join(lines))


def config(folder: Path, steps: int = 8, **changes) -> loop.RunConfig:
  """One MoE layer, `steps` steps, a checkpoint at every third."""
  model = ds.changed(
    presets.v3_tiny(),
    {
      'vocab_size': 261,
      'dim': 16,
      'layout': ((('moe',), 1),),
      'attention.heads': 2,
      'attention.q_rank': 8,
      'attention.kv_rank': 8,
      'attention.nope_dim': 4,
      'attention.rope_dim': 4,
      'attention.v_dim': 4,
      'ffn.width': 16,
      'moe.width': 8,
      'moe.top_k': 2,
      'moe.experts': 8,
      'mtp.depth': 0,
    },
  )
  made = loop.RunConfig(
    model=model,
    data=datalib.DataConfig(
      path=str(folder / 'corpus'),
      tokenizer='bytes',
      vocab_size=261,
      seq_len=LENGTH,
      heldout_fraction=0.25,
      cache_dir=str(folder / 'cache'),
    ),
    train=TrainConfig(
      tokens=steps * ROWS * LENGTH,
      batch=BatchConfig(ROWS),
      schedule=ScheduleConfig('constant', peak=3e-3, warmup=2),
    ),
    checkpoint_every=3,
    keep=10,
  )
  return ds.changed(made, changes)


_HOME = []


def home() -> Path:
  """A corpus and compiled programs, which the runs of this process share."""
  if not _HOME:
    _HOME.append(tempfile.TemporaryDirectory())
    write_corpus(Path(_HOME[0].name) / 'corpus')
  return Path(_HOME[0].name)


@functools.cache
def straight() -> loop.Run:
  """The run that nothing happens to, in home() / 'straight'."""
  return loop.fit(config(home()), home() / 'straight', console=False)


class RunTest(absltest.TestCase):
  """Runs of one configuration, each test's in a folder of its own."""

  def setUp(self):
    super().setUp()
    programs = str(home() / 'programs')
    jax.config.update('jax_compilation_cache_dir', programs)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    self.addCleanup(jax.config.update, 'jax_compilation_cache_dir', None)
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def fit(self, name: str, steps: int = 8, **changes) -> loop.Run:
    made = config(home(), steps, **changes)
    return loop.fit(made, self.folder / name, console=False)

  @contextlib.contextmanager
  def before_step(self, at: int, do):
    """Calls `do` when the batch of step `at` is asked for."""
    original = datalib.Batches.next

    def watched(batches, *args):
      if batches.get_state()['next_index'] == (at - 1) * ROWS:
        do()
      return original(batches, *args)

    with mock.patch.object(datalib.Batches, 'next', watched):
      yield

  def assert_same_as_straight(self, name: str, run: loop.Run):
    """The folder and the state of `run` are those of the undisturbed run."""
    left, right = flatten(straight().state), flatten(run.state)
    self.assertEqual(left.keys(), right.keys())
    for key in left:
      np.testing.assert_array_equal(left[key], right[key], err_msg=key)
    self.assert_same_metrics_as_straight(name)

  def assert_same_metrics_as_straight(self, name: str):
    straight()
    want = (home() / 'straight' / 'metrics.jsonl').read_bytes()
    self.assertEqual((self.folder / name / 'metrics.jsonl').read_bytes(), want)
