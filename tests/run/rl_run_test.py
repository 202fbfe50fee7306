"""A run over rollouts: rewards rise, and a killed round is drawn again."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.run import sources
from tests.rl.sft_run_test import TINY

OWN = 'def score(text, problem):\n  return float(text[:1] < "a")\n'


def task(folder, **changes):
  """Writes a task whose answers should begin with a small byte."""
  own = os.path.join(folder, 'own.py')
  Path(own).write_text(OWN)
  lines = [json.dumps({'prompt': f'p{n}'}) for n in range(40)]
  Path(folder, 'problems.jsonl').write_text('\n'.join(lines))
  spec = {
    'problems': 'problems.jsonl',
    'rewards': [{'kind': 'own', 'file': own}],
    'heldout': 0.2,
    **changes,
  }
  path = os.path.join(folder, 'task.json')
  Path(path).write_text(json.dumps(spec))
  return path


def config(folder, **changes):
  made = ds.RunConfig(
    TINY,
    ds.DataConfig(
      path=os.path.join(folder, 'task.json'),
      tokenizer='bytes',
      vocab_size=261,
      seq_len=16,
      fim_rate=0.0,
    ),
    ds.TrainConfig(
      16 * 16 * 12,
      ds.BatchConfig(16),
      schedule=ds.ScheduleConfig('constant', peak=0.1, warmup=0),
      optimizer=ds.OptimizerConfig(decay=0.0),
    ),
    objective=ds.GRPOConfig(kl='k3', kl_weight=0.001),
    rollouts=RolloutConfig(prompts=4, group=8, most=1, slots=8),
    chat=ds.ChatConfig('plain'),
    evaluate=ds.EvaluateConfig(every=5, documents=4),
    checkpoint_every=6,
  )
  return ds.changed(made, changes)


class RLRunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)
    task(self.folder)

  def test_rewards_rise_and_a_killed_round_is_drawn_again(self):
    first = os.path.join(self.folder, 'a')
    whole = ds.fit(config(self.folder), first, console=False)
    rows = ds.read_metrics(first)
    rewards = [r['reward'] for r in rows if 'reward' in r]
    self.assertLen(rewards, 12)
    self.assertGreater(np.mean(rewards[-3:]), np.mean(rewards[:3]) + 0.2)
    kl = [r['kl'] for r in rows if 'kl' in r]
    self.assertAlmostEqual(kl[0], 0, places=5)  # the reference is the start
    self.assertGreater(kl[-1], kl[0])
    gaps = [r['mismatch'] for r in rows if 'mismatch' in r]
    self.assertLess(max(gaps), 1e-5)  # the sampler is the trainer
    self.assertTrue(any('heldout_reward' in r for r in rows))
    other = os.path.join(self.folder, 'b')
    shutil.copytree(first, other)
    shutil.rmtree(os.path.join(other, 'checkpoints', '12'))
    again = ds.fit(config(self.folder), other, console=False)
    for a, b in zip(*(jax.tree.leaves(r.variables) for r in (whole, again))):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(
    ({'objective': ds.PretrainingConfig()}, 'rollouts: are learnt from by a'),
    ({'chat': None}, 'rollouts: are learnt from by a GRPO'),
    ({'objective.temperature': 0.5}, 'rollouts.temperature = 1.0'),
    ({'objective.keep_routing': True}, 'objective.keep_routing'),
    ({'rollouts.group': 1}, 'rollouts.group = 1'),
  )
  def test_what_does_not_fit_is_refused(self, changes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      config(self.folder, **changes)

  @parameterized.parameters(
    ({'data.path': '/nowhere'}, 'is no file of JSON'),
    ({'data.seq_len': 2}, 'data.seq_len = 2: a prompt of 3 tokens'),
    ({'data.tokenizer': 'bpe'}, "data.tokenizer = 'bpe'"),
  )
  def test_a_task_that_does_not_fit_is_named(self, changes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      sources.opened(config(self.folder, **changes), lambda line: None)

  def test_another_task_is_another_stream(self):
    made = config(self.folder)
    store = sources.opened(made, lambda line: None)
    state = sources.batches(store, made).get_state()
    task(self.folder, form='Q{}')
    store = sources.opened(made, lambda line: None)
    with self.assertRaisesRegex(ds.InputError, 'not those that the saved run'):
      sources.batches(store, made).set_state(state)

  def test_too_few_rows_are_named(self):
    made = config(self.folder, **{'train.batch.size': 1})
    store = sources.opened(made, lambda line: None)
    batches = sources.batches(store, made)
    variables = ds.build(TINY).init(jax.random.key(0))
    batches.see(lambda: variables)
    with self.assertRaisesRegex(
      ds.InputError, 'train.batch.size = 1: 32 answe'
    ):
      batches.next(1)


class LauncherTest(absltest.TestCase):
  def test_it_samples_learns_and_reports(self):
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    task(folder)
    made = ds.to_dict(config(folder, **{'train.tokens': 16 * 16 * 2.0}))
    own = os.path.join(folder, 'made.py')
    Path(own).write_text(
      'import deepseek_jax as ds\n'
      f'def get_config(): return ds.from_dict(ds.RunConfig, {made!r})\n'
    )
    workdir = os.path.join(folder, 'run')
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'experiments.grpo'),
        *(f'--config={own}', f'--workdir={workdir}'),
      ],
      cwd=Path(__file__).parents[2],
      capture_output=True,
      text=True,
      timeout=600,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'COLUMNS': '100'},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    for line in ('held-out reward before: ', 'held-out reward after: '):
      self.assertIn(line, done.stdout)
    self.assertTrue(Path(workdir, 'report.html').exists())


if __name__ == '__main__':
  absltest.main()
