"""The first step of a run, compiled beside the reading of its text."""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.record.metrics import NoMetrics
from deepseek_jax.run import sources
from deepseek_jax.run.steps import Steps
from tests.faults import runs


class AheadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    runs.write_corpus(self.folder / 'corpus')

  def config(self, **changes):
    changes = {name.replace('__', '.'): v for name, v in changes.items()}
    return ds.changed(runs.config(self.folder), changes)

  @parameterized.parameters(
    {},
    {'data__cross_document': False},
    {'data__fim_rate': 0.5},
    {'train__batch': ds.BatchConfig(8, start=2, ramp_tokens=1e3)},
  )
  def test_the_first_batch_is_as_foretold(self, **changes):
    config = self.config(**changes)
    store = sources.opened(config, lambda line: None)
    batches = sources.batches(store, config)
    batch = batches.next(config.train.batch.at(0))
    kinds = lambda arrays: {n: (a.shape, a.dtype) for n, a in arrays.items()}
    self.assertEqual(kinds(sources.batch_like(config)), kinds(batch))

  def test_what_the_data_decide_is_not_foretold(self):
    missing = self.config(data__path=str(self.folder / 'none'))
    for config in (
      missing,
      ds.recipes.engram_tiny(),
      ds.recipes.sft_tiny(),
      ds.recipes.grpo_tiny(),
      ds.recipes.distill_tiny(),
    ):
      self.assertIsNone(sources.batch_like(config))

  def steps(self, config):
    steps = Steps(ds.build(config.model), config)
    return steps, sources.batch_like(config)

  def test_a_thread_compiles_what_the_first_step_takes(self):
    config = self.config()
    steps, like = self.steps(config)
    threads = []
    compile_one = jax.stages.Lowered.compile

    def compiled(lowered, *args, **kwargs):
      threads.append(threading.current_thread())
      return compile_one(lowered, *args, **kwargs)

    with mock.patch.object(jax.stages.Lowered, 'compile', compiled):
      steps.compile_ahead(like)
      lines = mock.Mock(spec=NoMetrics)
      state, metrics = steps(steps.begin(), steps.batch(like, len(like)), lines)
    own = [t for t in threads if t is not threading.main_thread()]
    self.assertLen(own, 1)
    self.assertEqual(int(state.step), 1)
    said = [call.args[0] for call in lines.log.call_args_list]
    self.assertRegex(said[-1], r'compiled the step for 4 sequences in .* s, ')
    # The numbers of a program that the first step compiled.
    plain, _ = self.steps(config)
    want = plain(plain.begin(), plain.batch(like, len(like)), NoMetrics())[1]
    jax.tree.map(np.testing.assert_array_equal, metrics, want)

  def test_another_batch_is_compiled_for_itself(self):
    steps, like = self.steps(self.config())
    steps.compile_ahead(like)
    other = like | {'segments': like['tokens'], 'positions': like['tokens']}
    state, _ = steps(steps.begin(), steps.batch(other, 4), NoMetrics())
    self.assertEqual(int(state.step), 1)

  def test_what_fails_in_the_thread_fails_the_step(self):
    steps, like = self.steps(self.config())
    state = steps.begin()
    with mock.patch.object(
      jax.stages.Lowered, 'compile', side_effect=RuntimeError('no memory')
    ):
      steps.compile_ahead(like)
      with self.assertRaisesRegex(RuntimeError, 'no memory'):
        steps(state, steps.batch(like, 4), NoMetrics())

  def test_an_ending_does_not_wait_for_the_thread(self):
    script = (
      'import concurrent.futures as f, time\n'
      'from deepseek_jax.parallel import endings\n'
      'pool = f.ThreadPoolExecutor(1)\n'
      'endings.not_to_wait_for(pool.submit(time.sleep, 300))\n'
      'print("before")\n'
      'endings.leave(143, "ended")\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', script],
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    self.assertEqual(done.returncode, 143)
    self.assertEqual((done.stdout, done.stderr), ('before\n', 'ended\n'))

  def test_a_run_begins_one_when_it_is_new(self):
    with mock.patch.object(Steps, 'compile_ahead', autospec=True) as begun:
      for expected in (1, 1):
        ds.fit(self.config(), self.folder / 'run', console=False)
        self.assertEqual(begun.call_count, expected)


if __name__ == '__main__':
  absltest.main()
