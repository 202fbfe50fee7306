"""Distillation as a run: on conversations, on own answers, resumed."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.rope import RopeConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.run import opening, sources
from deepseek_jax.run.teachers import Teachers
from tests import tiny
from tests.rl import taught

# A dense Llama, narrower than its teacher.
STUDENT = ds.TransformerConfig(
  vocab_size=261,
  dim=12,
  layout=((('dense',), 1),),
  attention=GQAConfig(
    heads=2, kv_heads=1, head_dim=6, rope=RopeConfig(interleaved=False)
  ),
  ffn=FFNConfig(16),
  norm_eps=1e-5,
  init_std=0.02,
)

pytestmark = pytest.mark.slow


class DistillRunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)
    self.teacher = os.path.join(taught.folder(), 'teacher')

  def config(self, **changes):
    chats = os.path.join(taught.folder(), 'chats.jsonl')
    made = taught.config(
      chats,
      **{
        'model': STUDENT,
        'train.tokens': 24 * 8 * 12.0,
        'checkpoint_every': 6,
        'objective': ds.DistillConfig(beta=0.0, teachers={self.teacher: 1.0}),
      },
    )
    return ds.changed(made, changes)

  def on_policy(self, **changes):
    return self.config(
      **{
        'data.path': os.path.join(taught.folder(), 'task.json'),
        'objective.beta': 1.0,
        'rollouts': ds.RolloutConfig(prompts=4, group=2, most=6, slots=8),
        'evaluate': ds.EvaluateConfig(every=6, documents=2),
        **changes,
      }
    )

  def check_resumes(self, config):
    """A run learns; without its last checkpoint it ends in the same weights."""
    first = os.path.join(self.folder, 'a')
    whole = ds.fit(config, first, console=False)
    rows = ds.read_metrics(first)
    losses = [r['loss'] for r in rows if 'loss' in r]
    self.assertLess(np.mean(losses[-3:]), 0.9 * losses[0])
    other = os.path.join(self.folder, 'b')
    shutil.copytree(first, other)
    shutil.rmtree(os.path.join(other, 'checkpoints', '12'))
    again = ds.fit(config, other, console=False)
    for a, b in zip(*(jax.tree.leaves(r.variables) for r in (whole, again))):
      np.testing.assert_array_equal(a, b)
    return whole, rows

  @pytest.mark.slow
  def test_on_conversations_it_learns_and_goes_on(self):
    run, _ = self.check_resumes(self.config())
    # The teacher's distribution is nearer than before, by NumPy.
    store = run.store
    batch = sources.batches(store, run.config).next(4)
    source = taught.opened()
    at = lambda model, variables: np.float64(
      jax.jit(model.apply)(
        variables,
        batch['tokens'][:, :-1],
        positions=batch['positions'][:, :-1],
        segment_ids=batch['segments'][:, :-1],
      ).logits
    )
    soft = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    teacher = soft(at(source.model, source.variables))
    # The states that the batch has make the very logits.
    states = np.float64(batch['teacher_hidden'][:, :-1, 0])
    made = soft(states @ np.float64(batch['teacher_heads'][0]))
    real = batch['segments'][:, :-1] > 0
    np.testing.assert_allclose(made[real], teacher[real], atol=1e-4)
    student = soft(at(run.model, run.variables))
    kl = (np.exp(teacher) * (teacher - student)).sum(-1)
    on = batch['trained'][:, 1:] * (
      batch['segments'][:, 1:] == batch['segments'][:, :-1]
    )
    fresh = run.model.init(jax.random.key(0))
    before = soft(at(run.model, fresh))
    kl_before = (np.exp(teacher) * (teacher - before)).sum(-1)
    mean = lambda x: (x * on).sum() / on.sum()
    self.assertLess(mean(kl), 0.8 * mean(kl_before))

  @pytest.mark.slow
  def test_on_its_own_answers_it_learns_and_goes_on(self):
    run, rows = self.check_resumes(self.on_policy())
    told = [r for r in rows if 'reward' in r]
    self.assertLen(told, 12)
    self.assertTrue(any('heldout_reward' in r for r in rows))
    batches = sources.batches(run.store, run.config)
    batches.see(lambda: run.variables)
    first = batches.next(8)
    again = sources.batches(run.store, run.config)
    again.see(lambda: run.variables)
    np.testing.assert_array_equal(again.next(8)['tokens'], first['tokens'])
    # Other weights draw other answers to the same prompts.
    again = sources.batches(run.store, run.config)
    fresh = run.model.init(jax.random.key(9))
    again.see(lambda: fresh)
    other = again.next(8)
    self.assertFalse(np.array_equal(other['tokens'], first['tokens']))
    # Just what was sampled is learnt, never a prompt: those hold a '='.
    marked = first['tokens'][(first['trained'] > 0)]
    prompts = first['tokens'][(first['trained'] == 0) & (first['segments'] > 0)]
    decode = run.store.tokenizer().decode
    self.assertEqual(decode(prompts.tolist()).count('='), 8)
    self.assertGreater(len(marked), 0)
    too_few = sources.batches(run.store, run.config)
    too_few.see(lambda: run.variables)
    with self.assertRaisesRegex(ds.InputError, 'train.batch.size = 1: 8 answe'):
      too_few.next(1)

  def saved(self, config):
    """Returns a Hugging Face folder of a model, with the run's tokenizer."""
    folder = os.path.join(self.folder, 'hf')
    weights = tiny.draw(ds.build(config))
    hf.save(folder, config, weights, extra={'eos_token_id': 1})
    shutil.copy(os.path.join(self.teacher, 'tokenizer.json'), folder)
    return folder

  def check_says(self, batch, teacher, place):
    """The states of a batch make the very logits of a teacher's folder."""
    out = jax.jit(teacher.model.apply)(
      teacher.variables,
      batch['tokens'][:, :-1],
      positions=batch['positions'][:, :-1],
      segment_ids=batch['segments'][:, :-1],
    )
    states = batch['teacher_hidden'][:, :-1, place]
    made = states @ batch['teacher_heads'][place]
    real = batch['segments'][:, :-1] > 0
    np.testing.assert_allclose(made[real], out.logits[real], atol=1e-4)

  def test_several_teachers_of_other_widths_from_anywhere(self):
    # A run, and a Hugging Face folder of a dense model.
    folder = self.saved(STUDENT)
    named = {self.teacher: 1.0, folder: 3.0}
    config = self.config(**{'objective.teachers': named})
    store = sources.opened(config, lambda line: None)
    batch = sources.batches(store, config).next(8)
    self.assertEqual(batch['teacher_hidden'].shape, (8, 25, 2, 16))
    self.assertEqual(batch['teacher_heads'].shape, (2, 16, 261))
    other = opening.opened(folder)
    self.assertIsNone(other.config)
    self.check_says(batch, other, 1)

  def test_experts_of_hugging_face_teach_a_dense_student(self):
    # V3 with latent attention, a bias that routes, and multi-token prediction.
    folder = self.saved(ds.changed(tiny.config('v3'), {'vocab_size': 261}))
    named = {folder: 1.0}
    config = self.config(**{'objective.teachers': named})
    store = sources.opened(config, lambda line: None)
    batch = sources.batches(store, config).next(8)
    teacher = opening.opened(folder)
    self.assertTrue(jax.tree.leaves(teacher.variables['buffers']))
    self.check_says(batch, teacher, 0)
    workdir = os.path.join(self.folder, 'run')
    ds.fit(config, workdir, console=False)
    losses = [r['loss'] for r in ds.read_metrics(workdir) if 'loss' in r]
    self.assertLess(np.mean(losses[-3:]), 0.9 * losses[0])

  def test_what_does_not_fit_is_refused(self):
    for changes, message in (
      ({'chat': None}, 'objective = distill: learns the answers'),
      ({'mesh.stage': 2}, 'mesh.stage = 2: teachers have no stages'),
      ({'rollouts': ds.RolloutConfig(updates=2)}, 'rollouts.updates = 2'),
    ):
      with self.assertRaisesRegex(ds.InputError, message):
        self.config(**changes)
    store = sources.opened(self.config(), lambda line: None)
    for changes, message in (
      ({'objective.teachers': None}, 'objective.teachers: names none'),
      ({'objective.teachers': {'/nowhere': 1.0}}, 'nowhere: is no folder'),
      ({'objective.teachers': {self.folder: 1.0}}, 'has no config.json'),
      (
        {'model.vocab_size': 300, 'data.vocab_size': 300},
        'has a vocabulary of 261 tokens, the student of 300',
      ),
    ):
      with self.assertRaisesRegex(ds.InputError, message):
        Teachers(self.config(**changes), store.tokenizer())

    class Other:
      sha256 = 'other'

    with self.assertRaisesRegex(ds.InputError, 'mesh.context = 2: answers'):
      self.on_policy(**{'mesh.context': 2})
    with self.assertRaisesRegex(ds.InputError, 'has another tokenizer than'):
      Teachers(self.config(), Other())

  def test_other_weights_of_a_teacher_are_another_stream(self):
    config = self.config()
    store = sources.opened(config, lambda line: None)
    batches = sources.batches(store, config)
    state = json.loads(json.dumps(batches.get_state()))
    batches.set_state(state)
    state['teachers_sha256'] = 'x'
    with self.assertRaisesRegex(ds.InputError, 'their weights are not those'):
      batches.set_state(state)

  def test_a_run_stores_it(self):
    made = self.on_policy()
    stored = json.loads(json.dumps(ds.to_dict(made)))
    self.assertEqual(stored['objective']['kind'], 'distill')
    self.assertEqual(ds.from_dict(ds.RunConfig, stored), made)


class RecipeTest(absltest.TestCase):
  def test_the_student_is_one_that_hugging_face_knows(self):
    made = ds.recipes.distill_tiny()
    small = ds.changed(made.model, {'vocab_size': 32, 'dim': 32})
    with tempfile.TemporaryDirectory() as folder:
      hf.save(folder, small, ds.build(small).init(jax.random.key(0)))
      written = json.loads(Path(folder, 'config.json').read_text())
    self.assertEqual(written['model_type'], 'llama')


if __name__ == '__main__':
  absltest.main()
