"""A run as a whole: ends, resumes bit for bit, refuses what is not its own."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax import say
from deepseek_jax.errors import InputError, RunAborted
from deepseek_jax.record import flight, metrics
from deepseek_jax.run import fit as loop
from deepseek_jax.run import lock, trainer
from deepseek_jax.run import steps as step
from deepseek_jax.run.checkpoint import flatten
from deepseek_jax.train import evaluate, schedules
from deepseek_jax.train import step as train


def _write_corpus(folder: Path):
  folder.mkdir()
  for i in range(12):
    lines = [f'def f{i}_{j}(x):\n  return x + {j}\n' for j in range(30)]
    (folder / f'part{i}.py').write_text('\n'.join(lines))


def _config(folder: Path, **changes) -> loop.RunConfig:
  model = ds.changed(
    ds.presets.v3_tiny(),
    {
      'vocab_size': 261,
      'dim': 32,
      'layout': ((('dense', 'moe'), 1),),
      'attention.heads': 2,
      'attention.q_rank': 16,
      'attention.kv_rank': 16,
      'attention.nope_dim': 8,
      'attention.rope_dim': 4,
      'attention.v_dim': 8,
      'ffn.width': 48,
      'moe.width': 16,
      'moe.experts': 8,
      'moe.top_k': 2,
      'compute.xla': (),  # no choice is left to the machine
    },
  )
  config = loop.RunConfig(
    model=model,
    data=datalib.DataConfig(
      path=str(folder / 'corpus'),
      tokenizer='bytes',
      vocab_size=261,
      seq_len=32,
      heldout_fraction=0.25,
      cache_dir=str(folder / 'cache'),
    ),
    train=train.TrainConfig(
      tokens=32 * 4 * 32,
      batch=schedules.BatchConfig(4, accumulate=2),
      schedule=schedules.ScheduleConfig('cosine', peak=3e-3, warmup=2),
    ),
    evaluate=loop.EvaluateConfig(every=4, batch=4, documents=2),
    checkpoint_every=3,
    keep=10,
  )
  return ds.changed(config, changes)


class FinishedRunTest(parameterized.TestCase):
  """What holds of one run, trained once."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    _write_corpus(cls.folder / 'corpus')
    cls.config = _config(cls.folder)
    cls.trained = cls._fit()

  @classmethod
  def _fit(cls, name='run', config=None):
    return loop.fit(config or cls.config, cls.folder / name, console=False)

  def _interrupted(self, name, at):
    """Runs until the batch of step `at` is asked for, then dies."""
    original = datalib.Batches.next

    def dying(batches, *args):
      if batches.get_state()['next_index'] >= (at - 1) * 4:
        raise KeyboardInterrupt
      return original(batches, *args)

    patched = mock.patch.object(datalib.Batches, 'next', dying)
    with patched, self.assertRaises(KeyboardInterrupt):
      self._fit(name)

  def _assert_same_run(self, a: str, b: str, state_a, state_b):
    left, right = flatten(state_a), flatten(state_b)
    self.assertEqual(left.keys(), right.keys())
    for name in left:
      np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    read = lambda name, file: (self.folder / name / file).read_bytes()
    self.assertEqual(read(a, 'metrics.jsonl'), read(b, 'metrics.jsonl'))

  def test_resumed_run_equals_straight_run_bit_for_bit(self):
    # Killed twice: before the first checkpoint, and between two.
    self._interrupted('resumed', 2)
    self._interrupted('resumed', 6)
    resumed = self._fit('resumed')
    self._assert_same_run('run', 'resumed', self.trained.state, resumed.state)
    routing = [
      flight.load(self.folder / name / 'routing.npz').arrays
      for name in ('run', 'resumed')
    ]
    for name in routing[0]:
      np.testing.assert_array_equal(routing[0][name], routing[1][name])

  def test_a_finished_run_started_again_is_left_as_it_is(self):
    again = self._fit()
    self._assert_same_run('run', 'run', self.trained.state, again.state)
    self.assertIsNone(again.tokens_per_second)

  def test_loss_falls_and_every_step_is_logged(self):
    rows = metrics.read(self.folder / 'run')
    losses = [r['loss'] for r in rows if 'loss' in r]
    self.assertLen(losses, 32)
    self.assertLess(losses[-1], losses[0] - 1.5)
    bits = [
      r['validation_bits_per_byte']
      for r in rows
      if 'validation_bits_per_byte' in r
    ]
    self.assertLess(bits[-1], bits[0])

  def test_expert_loads_count_every_choice(self):
    load = flight.load(self.folder / 'run' / 'routing.npz').arrays['load']
    np.testing.assert_array_equal(load.sum(axis=-1), 4 * 32 * 2)

  def test_another_configuration_is_refused_and_nothing_overwritten(self):
    before = (self.folder / 'run' / 'config.json').read_bytes()
    other = ds.changed(self.config, {'model.moe.top_k': 3})
    with self.assertRaisesRegex(InputError, r'model\.moe\.top_k: 2 there, 3'):
      self._fit(config=other)
    self.assertEqual((self.folder / 'run' / 'config.json').read_bytes(), before)

  @pytest.mark.slow
  def test_what_changes_no_trained_number_may_differ(self):
    self._interrupted('other', 6)
    moved = self.folder / 'moved' / 'corpus'
    shutil.copytree(self.folder / 'corpus', moved)
    changes = {
      'keep': 3,
      'checkpoint_every': 5,
      'evaluate.every': 0,
      'evaluate.batch': 2,
      'train.gate.patience': 4,
      'data.path': f'{moved}/',
      'data.cache_dir': str(self.folder / 'moved' / 'cache'),
    }
    other = ds.changed(self.config, changes)
    lines = []
    log = lambda writer, text: lines.append(text)
    with mock.patch.object(metrics.MetricsWriter, 'log', log):
      resumed = self._fit('other', other)
    left, right = flatten(self.trained.state), flatten(resumed.state)
    for name in left:
      np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    saved = json.loads((self.folder / 'other' / 'config.json').read_text())
    self.assertEqual(ds.from_dict(loop.RunConfig, saved), other)
    told = [line for line in lines if line.startswith('config.json changed: ')]
    self.assertLen(told, len(changes))
    self.assertIn('config.json changed: keep: 10 there, 3 here', told)

  def test_another_text_is_refused_and_nothing_overwritten(self):
    folder = self.folder / 'run'
    files = [folder / name for name in ('config.json', 'tokenizer.json')]
    # The tokenizer of bytes is the same for any text; that it is written shows.
    seen = lambda: [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    before = seen()
    shutil.copytree(self.folder / 'corpus', self.folder / 'longer')
    (self.folder / 'longer' / 'more.py').write_text('x = 1\n' * 50)
    path = str(self.folder / 'longer')
    other = ds.changed(self.config, {'data.path': path})
    with self.assertRaisesRegex(InputError, 'data.path: the token windows are'):
      self._fit(config=other)
    self.assertEqual(seen(), before)

  @parameterized.parameters(
    {'seed': 1},
    {'train.tokens': 9999.0},
    {'evaluate.stride': 8},
    {'evaluate.documents': 3},
    {'data.seed': 1},
    {'init_from': 'elsewhere'},
    {'train.gate.sigma': 3.0},
    {'model.compute.remat': 'full'},
  )
  def test_what_changes_numbers_may_not_differ(self, **changes):
    other = ds.changed(self.config, changes)
    field = next(iter(changes))
    with self.assertRaisesRegex(InputError, f'holds another run .{field}: '):
      self._fit(config=other)

  def test_another_path_needs_a_checkpoint(self):
    begun = self.folder / 'begun'
    loop.claim(begun, self.config)
    other = ds.changed(self.config, {'data.path': 'elsewhere'})
    with self.assertRaisesRegex(InputError, 'holds another run .data.path: '):
      loop.claim(begun, other)

  def test_the_loss_comes_first_of_a_step(self):
    first = metrics.read(self.folder / 'run')[0]
    self.assertEqual(list(first)[:2], ['step', 'loss'])

  def test_an_earlier_step_can_be_loaded(self):
    saved = sorted(
      int(p.name) for p in (self.folder / 'run' / 'checkpoints').iterdir()
    )
    first = ds.load(self.folder / 'run', step=saved[0])
    self.assertEqual(first.step, saved[0])
    self.assertEqual(ds.load(self.folder / 'run').step, saved[-1])
    trained = np.asarray(self.trained.state.params['embed'])
    self.assertTrue((first.variables['params']['embed'] != trained).any())
    with self.assertRaisesRegex(InputError, r'step = 4: .* has saved \d+, \d+'):
      ds.load(self.folder / 'run', step=4)

  def test_load_needs_no_data(self):
    corpus = self.folder / 'corpus'
    away = corpus.rename(self.folder / 'away')
    loaded = loop.load(self.folder / 'run')
    away.rename(corpus)
    for a, b in zip(
      jax.tree.leaves(self.trained.variables), jax.tree.leaves(loaded.variables)
    ):
      np.testing.assert_array_equal(a, b)
    text = 'def f(x): return ü'
    self.assertEqual(
      loaded.tokenizer.decode(loaded.tokenizer.encode(text)), text
    )

  def test_bits_per_byte_against_one_document_at_a_time(self):
    run = self.trained
    heldout = datalib.Heldout(run.store, 32, batch=4)
    bits = evaluate.bits_per_byte(run.model, run.variables, heldout)
    total, size = 0.0, 0
    # Compiled once, for padded windows: no logit sees what comes after it.
    forward = jax.jit(run.model.apply)
    # Windows of the whole length: every token has its full context or 16
    # tokens of it, so the plain average must lie close above this bound.
    for text in run.store.heldout_texts():
      ids = run.store.tokenizer().encode(text)
      ids = [run.store.eos_id, *ids, run.store.eos_id]
      size += len(text.encode())
      for start in range(0, len(ids) - 1, 16):
        window = ids[max(start - 16, 0) : start + 17]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        out = forward(run.variables, padded)
        logits = np.asarray(out.logits[0], np.float64)
        probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        first = len(window) - 1 - min(16, len(ids) - 1 - start)
        for t in range(first, len(window) - 1):
          total -= float(probs[t, window[t + 1]])
    self.assertAlmostEqual(bits, total / np.log(2) / size, delta=0.05)

  def test_config_is_saved_resolved(self):
    saved = json.loads((self.folder / 'run' / 'config.json').read_text())
    self.assertEqual(ds.from_dict(loop.RunConfig, saved), self.config)


class LoopTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    _write_corpus(self.folder / 'corpus')
    self.config = _config(self.folder)

  def _fit(self, name='run', config=None):
    return loop.fit(config or self.config, self.folder / name, console=False)

  @pytest.mark.slow
  def test_batch_ramp_is_part_of_the_step_count(self):
    ramp = dataclasses.replace(
      self.config.train,
      batch=schedules.BatchConfig(
        4, start=2, increment=2, ramp_tokens=4 * 32 * 2.0
      ),
    )
    config = dataclasses.replace(self.config, train=ramp)
    run = self._fit(config=config)
    self.assertEqual(int(run.state.step), config.steps)
    self.assertGreater(config.steps, self.config.steps)
    self.assertGreaterEqual(int(run.state.sequences) * 32, ramp.tokens)

  def test_a_ramp_with_a_size_that_the_mesh_cannot_share_is_refused(self):
    batch = schedules.BatchConfig(8, start=4, increment=1, ramp_tokens=1e3)
    train = dataclasses.replace(self.config.train, batch=batch)
    mesh = dataclasses.replace(self.config.mesh, data=2)
    config = dataclasses.replace(self.config, train=train, mesh=mesh)
    with self.assertRaisesRegex(InputError, '5 sequences'):
      step.check_mesh(config)

  def test_what_cannot_be_a_folder_is_refused(self):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    file = folder / 'file'
    file.write_text('mine')
    for bad in (file, file / 'below', Path('/proc/foo')):
      with self.assertRaisesRegex(InputError, f'workdir {bad}: cannot be made'):
        loop.claim(bad, _config(folder))
    self.assertEqual(file.read_text(), 'mine')

  def test_a_folder_that_a_run_is_using_is_refused(self):
    folder = self.folder / 'used'
    busy = mock.patch.object(lock, 'take', side_effect=InputError('under way'))
    with busy, self.assertRaisesRegex(InputError, 'under way'):
      loop.claim(folder, self.config)
    self.assertEmpty(list(folder.iterdir()))
    loop.claim(folder, self.config)
    with busy, self.assertRaisesRegex(InputError, 'under way'):
      loop.claim(folder, self.config)

  @pytest.mark.slow
  def test_a_run_below_its_own_text_goes_on(self):
    config = ds.changed(
      self.config,
      {'data.path': str(self.folder), 'train.tokens': 6 * 4 * 32.0},
    )

    def dying(*args):
      raise KeyboardInterrupt

    with (
      mock.patch.object(trainer.Trainer, '_validate', dying),
      self.assertRaises(KeyboardInterrupt),
    ):
      self._fit('runs/x', config)
    self.assertTrue((self.folder / 'runs/x/metrics.jsonl').read_text())
    with mock.patch.object(say, 'warn') as warned:
      run = self._fit('runs/x', config)
    self.assertEqual(int(run.state.step), 6)
    (line,) = [call.args[0] for call in warned.call_args_list]
    self.assertIn("1 a run's folder (runs/x/)", line)
    self.assertIn('1 a token store (cache/tokens/', line)

  @parameterized.parameters('.lock', 'config.tmp')
  def test_what_a_run_leaves_that_never_began_is_no_hindrance(self, name):
    (self.folder / 'run').mkdir()
    (self.folder / 'run' / name).touch()
    self.assertEqual(loop.claim(self.folder / 'run', self.config), [])

  def test_a_config_json_that_is_nested_too_deeply_is_refused(self):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / 'config.json').write_text('[' * 99_999)
    for read in (
      lambda: loop.claim(folder, self.config),
      lambda: loop.load(folder),
    ):
      with self.assertRaisesRegex(InputError, r'config\.json is not JSON'):
        read()

  def test_a_path_that_no_folder_can_have_is_refused(self):
    with self.assertRaisesRegex(InputError, 'workdir .*no path'):
      loop.fit(self.config, 'a\0b', console=False)
    for field in ('init_from', 'data.path', 'data.tokenizer', 'data.cache_dir'):
      with self.assertRaisesRegex(InputError, field):
        ds.changed(self.config, {field: 'a\0b'})

  @parameterized.parameters('[]', '3', 'null')
  def test_a_config_json_without_an_object_is_refused(self, text):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / 'config.json').write_text(text)
    with self.assertRaisesRegex(InputError, r'config\.json is not a JSON obj'):
      loop.claim(folder, _config(folder))

  def test_a_folder_with_other_files_is_refused(self):
    (self.folder / 'run').mkdir()
    (self.folder / 'run' / 'thesis.tex').write_text('precious')
    with self.assertRaisesRegex(InputError, 'not empty and holds no run'):
      self._fit()

  def test_poisoned_run_gives_up_and_its_checkpoints_stay_finite(self):
    poisoned = ds.changed(
      self.config,
      {
        'train.gate': {'patience': 3, 'sigma': 0.0},
        'train.schedule.kind': 'constant',
        'train.tokens': 40 * 4 * 32.0,
      },
    )
    original = step.Steps.__call__

    def poison(steps, state, batch, writer):
      clean = state.params
      if int(state.step) < 4:
        return original(steps, state, batch, writer)
      clean = jax.tree.map(np.asarray, clean)
      params = dict(state.params, embed=state.params['embed'] * np.nan)
      state, metrics = original(
        steps, state._replace(params=params), batch, writer
      )
      return state._replace(params=clean), metrics

    patched = mock.patch.object(step.Steps, '__call__', poison)
    gives_up = self.assertRaisesRegex(RunAborted, '3 updates in a row')
    with patched, gives_up:
      self._fit(config=poisoned)
    loaded = loop.load(self.folder / 'run')
    self.assertEqual(loaded.step, 6)
    for leaf in jax.tree.leaves(loaded.variables):
      self.assertTrue(np.isfinite(leaf).all())


if __name__ == '__main__':
  absltest.main()
