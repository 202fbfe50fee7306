"""GRPO and SFT in a model: against NumPy, packed, spread, in micro-batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.data import packing
from deepseek_jax.infer import kept_tokens
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import Kind
from deepseek_jax.rl import grpo, log_probs, policy, sft
from deepseek_jax.train.objective import total_weight
from deepseek_jax.train.step import (
  initial_state,
  loss_and_metrics,
  metrics_of,
  train_step,
)
from tests import fake_devices, tiny
from tests.model import composition_test
from tests.rl import rollouts

T = 12


@functools.cache
def run_of(model, objective):
  built = objective.build(model)

  def run(variables, batch):
    inputs = built.inputs(batch)
    shares = ds.Shares(total_weight(inputs), 1, jnp.float32(0.3))
    return loss_and_metrics(model, variables, batch, shares, built)[1]

  return jax.jit(run)


def found(model, variables, batch, objective):
  """Returns the metrics of a whole batch, in one micro-batch."""
  return jax.device_get(run_of(model, objective)(variables, batch))


@functools.cache
def llama_batch():
  model, variables = tiny.model('llama'), tiny.variables('llama')
  return rollouts.batch(model, variables, 4, T + 1)


class GRPOTest(parameterized.TestCase):
  def model(self):
    return tiny.model('llama'), tiny.variables('llama')

  @parameterized.parameters(
    *(('sequence_mean', None, t) for t in (1.0, 0.7)),
    ('token_mean', None, 1.0),
    ('constant', 9, 1.0),
    ('micro_batch_mean', None, 1.0),
    ('sum', None, 1.0),
  )
  def test_loss_is_that_of_numpy(self, aggregation, length, temperature):
    cfg = grpo.GRPOConfig(
      clip_high=0.28,
      kl='ratio_k3',
      kl_weight=0.1,
      off_policy_bound=0.05,
      aggregation=aggregation,
      length=length,
      temperature=temperature,
    )
    batch = llama_batch()
    got = found(*self.model(), batch, cfg)
    self.assertLessEqual(set(got) - set(metrics_of(cfg.build(None))), {'loads'})
    # The objective's own formula in float64, on log-probs by NumPy.
    table = rollouts.log_probs(*self.model(), batch) / temperature
    table -= np.log(np.exp(table).sum(-1, keepdims=True))
    at = lambda name: jnp.asarray(np.float64(batch[name][:, 1:]))
    with jax.enable_x64(True):
      inside = batch['segments'][:, 1:] == batch['segments'][:, :-1]
      tokens = policy.PolicyTokens(
        jnp.asarray(rollouts.of_labels(table, batch)[:, 1:]),
        *map(at, ('old', 'sampler', 'reference', 'advantages')),
        at('trained') * inside,
        jnp.asarray(batch['segments'][:, :-1]),
      )
      want = float(policy.loss(cfg, tokens))
    np.testing.assert_allclose(got['loss'], want, rtol=2e-5)

  def test_without_values_of_its_own_a_step_is_on_policy(self):
    names = ('tokens', 'segments', 'positions', 'trained', 'advantages')
    batch = {k: llama_batch()[k] for k in names}
    cfg = grpo.GRPOConfig(aggregation='token_mean')
    got = found(*self.model(), batch, cfg)
    self.assertAlmostEqual(got['ratio'], 1.0, places=6)
    self.assertEqual(got['mismatch'], 0.0)
    on = batch['trained'][:, 1:] > 0
    want = -batch['advantages'][:, 1:][on].mean()
    np.testing.assert_allclose(got['loss'], want, rtol=1e-5)

  def test_numbers_of_segments_mean_nothing(self):
    batch = llama_batch()
    want = found(*self.model(), batch, grpo.GRPOConfig())['loss']
    # Runs are documents: ids may be large, or come again in a row.
    for rename in (lambda s: s * 1000, lambda s: np.where(s == 3, 1, s)):
      named = batch | {'segments': rename(batch['segments']).astype(np.int32)}
      got = found(*self.model(), named, grpo.GRPOConfig())['loss']
      self.assertAlmostEqual(got, want, places=5)

  def test_entropy_is_that_of_the_whole_distribution(self):
    batch = llama_batch()
    table = rollouts.log_probs(*self.model(), batch)
    entropy = -(np.exp(table) * table).sum(-1)
    on = batch['trained'][:, 1:] > 0
    cfg = grpo.GRPOConfig(aggregation='token_mean')
    got = found(*self.model(), batch, cfg)
    np.testing.assert_allclose(
      got['policy_entropy'], entropy[on].mean(), rtol=1e-5
    )

  @parameterized.parameters(
    ({'kl': 'k3', 'kl_weight': 0.1}, 'reference'),
    ({}, 'advantages'),
    ({}, 'trained'),
    ({'keep_sampling_mask': True}, 'kept'),
  )
  def test_a_batch_that_lacks_a_field_is_refused(self, fields, name):
    batch = {k: v for k, v in llama_batch().items() if k != name}
    with self.assertRaisesRegex(ds.InputError, f"batch has no '{name}'"):
      found(*self.model(), batch, grpo.GRPOConfig(**fields))

  def test_a_split_in_two_order_and_padding_change_nothing(self):
    self.check_steps(
      '2 devices', '2 micro-batches', 'another order', 'more padding'
    )

  @pytest.mark.slow
  def test_devices_micro_batches_and_order_change_nothing(self):
    self.check_steps()

  def check_steps(self, *cases):
    found = fake_devices.run('tests.rl.grpo_worker', *cases)
    self.assertContainsSubset(cases, found)
    for name, gaps in found.items():
      with self.subTest(name):
        self.assertLess(gaps['params'], 1e-6)
        self.assertLess(gaps['metrics'], 2e-6)

  def test_a_run_stores_it(self):
    made = ds.RunConfig(
      tiny.config('llama'),
      ds.DataConfig(vocab_size=tiny.VOCAB),
      ds.TrainConfig(1e6, ds.BatchConfig(8)),
      objective=grpo.v32(off_policy_bound=0.1),
    )
    stored = ds.to_dict(made)
    self.assertEqual(stored['objective']['kind'], 'grpo')
    self.assertEqual(ds.from_dict(ds.RunConfig, stored), made)


class FrozenTest(parameterized.TestCase):
  """Prediction blocks and router biases of a step of GRPO."""

  @parameterized.parameters(
    ({}, False, False),
    ({'mtp': 'trained', 'router_bias': 'updated'}, True, True),
  )
  def test_they_keep_every_bit_unless_asked(self, fields, blocks, biases):
    model, variables = tiny.model('step'), tiny.variables('step')
    recipe = ds.TrainConfig(
      1e6,
      ds.BatchConfig(2),
      optimizer=ds.OptimizerConfig(decay=0.1),
      schedule=ds.ScheduleConfig('constant', peak=1e-2, warmup=0),
    )
    batch = rollouts.batch(model, variables, 2, T + 1)
    state = initial_state(model, recipe, variables)
    step = jax.jit(train_step(model, recipe, grpo.GRPOConfig(**fields)))
    after, told = step(state, batch)
    same = lambda a, b: jax.tree.map(np.array_equal, a, b)
    params = same(after.params, state.params)
    self.assertEqual(not any(jax.tree.leaves(params['mtp'])), blocks)
    self.assertEqual(all(jax.tree.leaves(params['mtp'])), not blocks)
    self.assertFalse(any(jax.tree.leaves(params['segments'])))
    kept = same(after.buffers['segments'], state.buffers['segments'])
    self.assertEqual(all(jax.tree.leaves(kept)), not biases)
    self.assertEqual('mtp_loss' in told, blocks)

  def test_what_was_sampled_teaches_prediction_alone(self):
    # Embedding and head are one matrix here: neither use of it learns.
    model, variables = tiny.model('dense_mtp'), tiny.variables('dense_mtp')
    batch = rollouts.batch(model, variables, 2, T + 1)
    batch['advantages'] = np.zeros_like(batch['advantages'])
    objective = grpo.GRPOConfig(mtp='trained').build(model)

    def loss(params):
      inputs = objective.inputs(batch)
      shares = ds.Shares(total_weight(inputs), 1, jnp.float32(0.3))
      given = {**variables, 'params': params}
      return loss_and_metrics(model, given, batch, shares, objective)[0]

    grads = jax.jit(jax.grad(loss))(variables['params'])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      most = float(jnp.abs(grad).max())
      if name.startswith('mtp.'):
        self.assertGreater(most, 1e-5, name)
      else:
        self.assertEqual(most, 0, name)

  def test_a_rare_reward_is_no_explosion(self):
    model, variables = tiny.model('llama'), tiny.variables('llama')
    gate = ds.changed(
      ds.TrainConfig(1e6, ds.BatchConfig(4)),
      {'gate.warmup': 2, 'schedule': ds.ScheduleConfig('constant', warmup=0)},
    )
    step = jax.jit(train_step(model, gate, grpo.GRPOConfig()))
    batch = llama_batch()
    names = ('tokens', 'segments', 'positions', 'trained', 'advantages')
    batch = {k: batch[k] for k in names}
    state, applied = initial_state(model, gate, variables), []
    for scale in (1e-3, 1e-3, 0, 1e-3, 1, 30, np.nan):
      scaled = batch | {'advantages': np.float32(batch['advantages'] * scale)}
      state, told = step(state, scaled)
      applied.append(bool(told['applied']))
    self.assertEqual(applied, [True] * 6 + [False])


class LogProbsTest(parameterized.TestCase):
  def drawn(self, V):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 5, 6)).astype(np.float32)
    head = rng.normal(size=(6, V)).astype(np.float32)
    labels = rng.integers(0, V, (2, 5))
    kept = rng.random((2, 5, V)) < 0.3
    kept[0, 1] = False  # no limit
    return hidden, head, labels, kept

  @parameterized.parameters((33, 3), (64, 4), (7, 100))
  def test_only_kept_tokens_share_the_probability(self, V, chunk):
    hidden, head, labels, kept = self.drawn(V)
    mask = np.ones((2, 5), np.float32)
    mask[1, 3] = 0
    run = functools.partial(log_probs.sampled, temperature=0.7, chunk=chunk)
    args = hidden, head, labels, mask
    got, entropy = run(*args, kept=kept_tokens.packed(kept))
    logits = np.float64(hidden) @ np.float64(head) / 0.7
    own = kept | np.eye(V, dtype=bool)[labels]
    own[0, 1] = True
    soft = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    want = soft(np.where(own, logits, -np.inf))
    want = np.take_along_axis(want, labels[..., None], -1)[..., 0] * mask
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    whole = soft(logits)
    want = -(np.exp(whole) * whole).sum(-1) * mask
    np.testing.assert_allclose(entropy, want, rtol=1e-5)
    np.testing.assert_allclose(entropy, run(*args)[1], rtol=1e-6)

  def test_bits_hold_what_was_packed(self):
    for V in (1, 31, 32, 33, 100):
      kept = np.random.default_rng(V).random((3, V)) < 0.5
      words = kept_tokens.packed(jnp.asarray(kept))
      self.assertEqual(words.shape, (3, kept_tokens.words_of(V)))
      np.testing.assert_array_equal(kept_tokens.unpacked(words, V), kept)

  def test_gradient_is_that_of_the_kept_tokens(self):
    V = 33
    hidden, head, labels, kept = self.drawn(V)
    mask = jnp.ones((2, 5))
    words = kept_tokens.packed(jnp.asarray(kept))

    def chunked(head):
      return log_probs.sampled(hidden, head, labels, mask, kept=words)[0].sum()

    def plain(head):
      own = kept | np.eye(V, dtype=bool)[labels]
      own[0, 1] = True
      logits = jnp.where(own, jnp.einsum('BTD,DV->BTV', hidden, head), -jnp.inf)
      log_p = jax.nn.log_softmax(logits)
      return jnp.take_along_axis(log_p, labels[..., None], -1).sum()

    np.testing.assert_allclose(
      jax.grad(chunked)(head), jax.grad(plain)(head), rtol=1e-4, atol=1e-5
    )

  def test_padding_without_any_sound_value_stays_out(self):
    hidden, head, labels, _ = self.drawn(33)
    mask = np.ones((2, 5), np.float32)
    mask[1] = 0
    labels[1] = -100
    got, entropy = log_probs.sampled(hidden, head, labels, mask)
    self.assertTrue((np.asarray(got[1]) == 0).all())
    self.assertTrue((np.asarray(entropy[1]) == 0).all())


@functools.cache
def every_attention():
  """A layer of each attention, with Engrams and multi-token prediction."""
  names = ('mla', 'dsa', 'csa', 'hca', 'nsa')
  kinds = {
    name: Kind(
      'ffn',
      (('attention', composition_test.ATTENTIONS[name]),),
      engram=name in ('mla', 'csa'),
    )
    for name in names
  }
  kinds['ahead'] = Kind('ffn')
  config = ds.TransformerConfig(
    tiny.VOCAB,
    tiny.DIM,
    ((names, 1),),
    tiny.MLA,
    ffn=FFNConfig(8),
    kinds=kinds,
    engram=EngramConfig(base=11, longest=3, heads=2, dim=4, conv=2),
    mtp=MTPConfig(2, 'ahead'),
  )
  model = ds.build(config)
  variables = jax.jit(model.init)(jax.random.key(0))
  return model, {**variables, 'params': tiny.fill(variables['params'])}


class SFTTest(parameterized.TestCase):
  def sequences(self):
    rng = np.random.default_rng(0)
    return [
      {
        'tokens': rng.integers(1, tiny.VOCAB, n).astype(np.int32),
        'trained': (np.arange(n) >= prompt).astype(np.float32),
      }
      for n, prompt in ((5, 2), (9, 4), (4, 1), (6, 5), (12, 3), (3, 0))
    ]

  def test_packed_losses_are_the_sum_of_unpacked_ones(self):
    model, variables = every_attention()
    sequences = self.sequences()
    lengths = [len(s['tokens']) for s in sequences]
    rows = packing.best_fit(lengths, 13)
    self.assertLess(len(rows), len(sequences))
    alone = packing.laid_out(sequences, [[n] for n in range(6)], 13)
    rows += [[]] * (len(sequences) - len(rows))  # one shape: one compilation
    packed = packing.laid_out(sequences, rows, 13)
    want = found(model, variables, alone, sft.SFTConfig())
    got = found(model, variables, packed, sft.SFTConfig())
    for name in ('loss', 'mtp_loss'):
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)

  def test_loss_is_the_mean_over_what_is_marked(self):
    model, variables = tiny.model('dense_mtp'), tiny.variables('dense_mtp')
    alone = packing.laid_out(self.sequences(), [[n] for n in range(6)], 13)
    got = found(model, variables, alone, sft.SFTConfig())
    table = rollouts.log_probs(model, variables, alone)
    said = rollouts.of_labels(table, alone)
    on = (alone['trained'] > 0) & (alone['positions'] > 0)
    np.testing.assert_allclose(got['loss'], -said[on].mean(), rtol=1e-5)

  def test_mtp_learns_the_first_token_of_an_answer(self):
    # Its place is in the prompt, which is not learnt.
    model, variables = tiny.model('dense_mtp'), tiny.variables('dense_mtp')
    sequence = {
      'tokens': np.arange(1, 7, dtype=np.int32),
      'trained': np.float32([0, 0, 0, 1, 0, 0]),
    }
    batch = packing.laid_out([sequence], [[0]], 7)
    inputs = sft.SFTConfig().build(None).inputs(batch)
    out = jax.jit(functools.partial(model.apply, mtp=True))(
      variables,
      inputs.tokens,
      positions=inputs.positions,
      segment_ids=inputs.segments,
    )
    head = np.float64(model.head(variables))
    want = 0
    for depth, hidden in enumerate(out.aux['mtp_hidden'], start=1):
      logits = np.float64(hidden[0, 2 - depth]) @ head
      want += np.log(np.exp(logits).sum()) - logits[4]
    got = found(model, variables, batch, sft.SFTConfig())['mtp_loss']
    np.testing.assert_allclose(got, want / 2, rtol=1e-5)

  def test_frozen_prediction_blocks_have_no_loss(self):
    model, variables = tiny.model('dense_mtp'), tiny.variables('dense_mtp')
    batch = packing.laid_out(self.sequences(), [[n] for n in range(6)], 13)
    got = found(model, variables, batch, sft.SFTConfig(mtp='frozen'))
    self.assertNotIn('mtp_loss', got)

  def test_text_without_a_mask_is_refused(self):
    model, variables = tiny.model('dense_mtp'), tiny.variables('dense_mtp')
    with self.assertRaisesRegex(ds.InputError, "batch has no 'trained'"):
      found(model, variables, tiny.documents(2, 9), sft.SFTConfig())

  def test_a_run_stores_it(self):
    run = ds.RunConfig(
      tiny.config('llama'),
      ds.DataConfig(vocab_size=tiny.VOCAB),
      ds.TrainConfig(1e6, ds.BatchConfig(8)),
      objective=sft.SFTConfig(mtp='frozen'),
      chat=ds.ChatConfig('plain'),
    )
    stored = ds.to_dict(run)
    self.assertEqual(stored['objective'], {'kind': 'sft', 'mtp': 'frozen'})
    self.assertEqual(ds.from_dict(ds.RunConfig, stored), run)
    with self.assertRaisesRegex(ds.InputError, 'objective = sft: .* set chat'):
      dataclasses.replace(run, chat=None)


if __name__ == '__main__':
  absltest.main()
