"""What a caller's ids mean: of tokens, documents, labels and padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.data import ngrams
from deepseek_jax.model import context, lookup
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import IndexerConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.memory import ngram_hash
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import Kind
from deepseek_jax.pipeline import stage_calls, stages
from deepseek_jax.train import step as train
from deepseek_jax.train.evaluate import negative_log_likelihood
from deepseek_jax.train.step import Shares
from tests import tiny

V, D, T = tiny.VOCAB, tiny.DIM, 19
SHARED = SharedKVConfig(2, 8, 4, 12, 2, 6, window=5)
ATTENTIONS = {
  'mla': tiny.MLA,
  'gqa': GQAConfig(4, 2, 6),
  'dsa': DSAConfig(
    2, 12, 16, 8, 4, 6, indexer=IndexerConfig(2, 8), top_k=4, block=8
  ),
  'nsa': NSAConfig(
    4,
    2,
    6,
    6,
    block=4,
    stride=2,
    hidden=8,
    select_block=4,
    select=3,
    window=5,
    queries=8,
  ),
  'window': SHARED,
  'csa': dataclasses.replace(
    SHARED,
    compress='csa',
    csa=CSAConfig(4, 2, 2, 8, block=8),
  ),
  'hca': dataclasses.replace(SHARED, compress='hca', hca=HCAConfig(4)),
}
HASH = MoEConfig(
  8, 2, 8, router=RouterConfig(bias=False, hash_vocab=V, scale=2.0)
)


@functools.cache
def model(name):
  """One block and a depth of prediction; 'engram' and 'hash' over GQA."""
  attention = ATTENTIONS.get(name, ATTENTIONS['gqa'])
  kind = Kind('moe' if name == 'hash' else 'ffn', engram=name == 'engram')
  return ds.build(
    ds.TransformerConfig(
      V,
      D,
      ((('one',), 1),),
      attention,
      FFNConfig(24),
      HASH,
      kinds={'one': kind, 'ahead': Kind('ffn')},
      mtp=MTPConfig(1, 'ahead'),
      engram=EngramConfig(11, heads=2, dim=8, conv=2)
      if name == 'engram'
      else None,
    )
  )


@functools.cache
def variables(name):
  made = tiny.draw(model(name))
  fresh = model(name).init(jax.random.key(0))
  return {'params': made['params'], 'buffers': fresh['buffers']}


@functools.cache
def jitted(name, dtype='float32', **flags):
  one = ds.build(ds.changed(model(name).config, {'compute.dtype': dtype}))
  return jax.jit(functools.partial(one.apply, **flags))


def outputs(name, tokens, **arrays):
  """Logits, and those of the depth [2 B T V]."""
  out = jitted(name, mtp=True)(variables(name), tokens, **arrays)
  head = model(name).head(variables(name))
  return np.stack([out.logits, out.aux['mtp_hidden'][0] @ head])


class TokensTest(parameterized.TestCase):
  @parameterized.parameters(-1, -100, V, V + 5, 2**31 - 1, -(2**31))
  def test_an_id_that_is_no_token_is_named(self, wrong):
    tokens = tiny.tokens(2, T)
    tokens[1, 3] = wrong
    message = rf'^tokens: {wrong} at \[row, token\] \[1, 3\] is outside the voc'
    with self.assertRaisesRegex(ds.InputError, message):
      model('gqa').apply(variables('gqa'), jnp.asarray(tokens))
    with self.assertRaisesRegex(ds.InputError, message):
      model('gqa').apply(variables('gqa'), tokens)

  @parameterized.product(
    name=('mla', 'gqa', 'dsa', 'nsa', 'csa', 'engram', 'hash'),
    wrong=(-1, V),
  )
  def test_inside_jit_its_row_is_nan_and_no_other_changes(self, name, wrong):
    tokens = tiny.tokens(3, T)
    want = outputs(name, tokens)
    tokens[1, 3] = wrong
    got = outputs(name, tokens)
    # Experts sum up in another order once tokens choose others.
    np.testing.assert_allclose(
      got[:, [0, 2]], want[:, [0, 2]], atol=1e-5, rtol=1e-5
    )
    lost = np.isnan(got[0, 1]).all(axis=-1)
    self.assertTrue(lost[3])
    if name != 'dsa':  # which need not choose it
      self.assertTrue(lost[3:].all())
    self.assertTrue(np.isnan(got[1, 1, 2]).all())  # reads the token ahead

  @parameterized.parameters(
    (np.uint8([0, 200]), [0, 200]),
    (np.int8([-1, 5]), [-1, 5]),
    (np.int64([2**32 + 5, -(2**40)]), [2**31 - 1, -(2**31)]),
    (np.uint32([2**31 + 1, 7]), [1 - 2**31, 7]),
  )
  def test_integers_of_any_width_keep_their_meaning(self, numbers, want):
    got = lookup.int32(numbers)
    self.assertEqual((got.dtype, got.tolist()), (jnp.int32, want))
    table = jnp.ones((256, 1))
    known = [0 <= n < 256 for n in want]
    read = lookup.rows(table, numbers)[:, 0]
    np.testing.assert_array_equal(np.isfinite(read), known)

  @parameterized.parameters('float32', 'bfloat16')
  def test_a_lookup_gives_no_other_row_and_no_gradient(self, dtype):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), dtype)
    index = jnp.array([0, -1, 5, 4, 4, -6, 2**31 - 1])
    read = lookup.rows(table, index)
    known = np.array([True, False, False, True, True, False, False])
    np.testing.assert_array_equal(read[known], table[index[known]])
    self.assertTrue(np.isnan(np.asarray(read[~known], np.float32)).all())
    weight = jnp.arange(1.0, 8.0).astype(dtype)[:, None]
    take = lambda t: (
      jnp.where(known[:, None], lookup.rows(t, index), 0) * weight
    )
    grad = jax.grad(lambda t: take(t).astype(jnp.float32).sum())(table)
    want = np.zeros((5, 3))
    want[0], want[4] = 1, 4 + 5
    np.testing.assert_array_equal(np.asarray(grad, np.float64), want)

  @parameterized.parameters('mla', 'nsa', 'csa', 'engram', 'hash')
  def test_padding_may_hold_anything(self, name):
    tokens = tiny.tokens(2, T)
    segments = np.ones((2, T), np.int32)
    segments[1, 15:] = 0
    want = outputs(name, tokens, segment_ids=segments)
    # Tokens at hand are read before anything is computed.
    apply = functools.partial(model(name).apply, segment_ids=segments)
    taken = lambda: jax.eval_shape(lambda v: apply(v, tokens), variables(name))
    taken()
    for filler in (-100, V + 7):
      tokens[1, 15:] = filler
      got = outputs(name, tokens, segment_ids=segments)
      real = segments > 0
      np.testing.assert_array_equal(got[0][real], want[0][real])
      # The depth reads one token ahead.
      np.testing.assert_array_equal(got[1, 1, :14], want[1, 1, :14])
      taken()
    tokens[1, 14] = V + 7
    with self.assertRaisesRegex(ds.InputError, str(V + 7)):
      taken()

  def test_a_hash_that_padding_holds_anything_of(self):
    tokens = tiny.tokens(1, T)
    segments = np.ones((1, T), np.int32)
    segments[0, 15:] = 0
    config, made = model('engram').config, variables('engram')
    rows = ngram_hash.host_hash(made['buffers'])(
      tokens, segments, np.arange(T)[None]
    )
    want = outputs('engram', tokens, segment_ids=segments, ngrams=rows)
    rows[0, 15:] = -7
    got = outputs('engram', tokens, segment_ids=segments, ngrams=rows)
    np.testing.assert_array_equal(got[0, 0, :15], want[0, 0, :15])
    rows[0, 4, 0, 0] = config.engram.rows(1)
    got = outputs('engram', tokens, segment_ids=segments, ngrams=rows)
    self.assertTrue(np.isnan(got[0, 0, 4:15]).all())
    apply = model('engram').apply
    with self.assertRaisesRegex(ds.InputError, r'^ngrams: .*the Engram tables'):
      apply(made, tokens, segment_ids=segments, ngrams=rows)

  @parameterized.parameters(-1, V)
  def test_the_host_hashes_no_id_that_is_no_token(self, wrong):
    how = ngram_hash.host_hash(variables('engram')['buffers'])
    ones = np.ones((1, 4), np.int32)
    with self.assertRaisesRegex(ds.InputError, f'tokens: {wrong} is outside'):
      how(ones * wrong, ones, ones)
    self.assertIsInstance(how, ngrams.NGrams)

  def test_a_hash_table_sends_what_is_no_token_nowhere(self):
    tokens = tiny.tokens(1, T)
    load = lambda: jitted('hash')(variables('hash'), tokens).aux['segments'][0]
    self.assertEqual(int(load()[0]['ffn']['load'].sum()), 2 * T)
    tokens[0, 3] = -1
    self.assertEqual(int(load()[0]['ffn']['load'].sum()), 2 * (T - 1))

  @parameterized.parameters(-1, V)
  def test_the_loss_of_a_step_is_nan(self, wrong):
    """The last token of a row is no input, but a label."""
    batch = tiny.documents(2, T + 1)
    step = jax.jit(
      lambda batch: train.loss_and_metrics(
        model('gqa'),
        variables('gqa'),
        batch,
        Shares(30.0, 1, 0.3),
        tiny.PRETRAINING,
      )[0]
    )
    self.assertTrue(np.isfinite(step(batch)))
    for place in (T, 4):
      tokens = batch['tokens'].copy()
      tokens[1, place] = wrong
      self.assertTrue(np.isnan(step({**batch, 'tokens': tokens})), place)

  def test_the_first_stage_of_a_pipeline_too(self):
    first = stages.cut(tiny.config('llama'), 2)[0]
    held = first.take(tiny.variables('llama')['params'])
    batch = tiny.documents(2, T + 1)
    batch['tokens'][1, 3] = -1
    stream = jax.jit(functools.partial(stage_calls.read, first))(
      {'params': held, 'buffers': {}}, None, batch
    )
    self.assertTrue(np.isfinite(stream[0]).all())
    self.assertTrue(np.isnan(stream[1, 3:]).any(axis=-1).all())

  @parameterized.parameters(
    ([[1, 2, 3]], r'^tokens: list, no array'),
    (np.ones((1, 3)), r'^tokens: float64\[1, 3\]'),
    (np.ones(3, int), r'^tokens: int64\[3\]'),
  )
  def test_what_is_no_array_of_tokens(self, tokens, message):
    with self.assertRaisesRegex(ds.InputError, message):
      model('gqa').apply(variables('gqa'), tokens)

  @parameterized.parameters('positions', 'segment_ids')
  def test_other_arrays_have_the_shape_of_tokens(self, name):
    tokens = tiny.tokens(2, T)
    for wrong in (np.ones((2, T + 1), int), np.ones((2, T)), [[1]]):
      with self.assertRaisesRegex(ds.InputError, f'^{name}: .*like tokens'):
        model('gqa').apply(variables('gqa'), tokens, **{name: wrong})


class DocumentsTest(parameterized.TestCase):
  def test_runs_are_numbered(self):
    got = context.documents(
      jnp.array([[1, 1, 2, 1, 0, 1], [0, 7, 7, 0, 7, -3]])
    )
    want = [[1, 1, 2, 3, 0, 4], [0, 1, 1, 0, 2, 0]]
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(-1, -(2**31))
  def test_an_id_below_0_is_named(self, wrong):
    segments = np.array([[1, 1, 0], [1, wrong, 2]], np.int32)
    message = rf'^segment_ids: {wrong} at \[row, token\] \[1, 1\] is below 0'
    for cache in (None, model('gqa').init_cache(2, 4)):
      with self.assertRaisesRegex(ds.InputError, message):
        model('gqa').apply(
          variables('gqa'),
          tiny.tokens(2, 3),
          segment_ids=segments,
          cache=cache,
        )

  @parameterized.parameters(*ATTENTIONS, 'engram')
  def test_an_id_that_comes_again_is_another_document(self, name):
    segments = np.int32(
      [[1] * 7 + [2] * 4 + [1] * 8, [3] * 6 + [0] * 5 + [3] * 8]
    )
    tokens = tiny.tokens(2, T)
    renamed = segments.copy()
    renamed[:, 11:] = 9
    same = outputs(name, tokens, segment_ids=segments)
    np.testing.assert_array_equal(
      same, outputs(name, tokens, segment_ids=renamed)
    )
    other = tokens.copy()
    other[:, :7] = (other[:, :7] + 5) % V
    changed = outputs(name, other, segment_ids=segments)
    # The depth's last place has no token ahead, and is no output.
    for depth, end in ((0, T), (1, T - 1)):
      np.testing.assert_array_equal(
        changed[depth, :, 11:end], same[depth, :, 11:end]
      )
    alone = outputs(name, tokens[:, 11:], segment_ids=np.ones((2, 8), np.int32))
    np.testing.assert_allclose(same[0, :, 11:], alone[0], atol=2e-5, rtol=2e-5)

  def test_a_packed_row_has_no_cache(self):
    one, held = model('gqa'), variables('gqa')
    tokens = tiny.tokens(2, 10)
    empty = one.init_cache(2, 16)
    ones = np.ones((2, 10), np.int32)
    for packed in ([1] * 6 + [2] * 4, [1] * 6 + [0] + [1] * 3):
      segments = np.stack([ones[0], packed]).astype(np.int32)
      message = r'^segment_ids: row 1 holds 2 documents; with a cache'
      with self.assertRaisesRegex(ds.InputError, message):
        one.apply(held, tokens, segment_ids=segments, cache=empty)
      out = jitted('gqa')(held, tokens, segment_ids=segments, cache=empty)
      self.assertTrue(np.isfinite(out.logits[0]).all())
      self.assertTrue(np.isnan(out.logits[1]).all())
    for fine in ([0] * 3 + [5] * 7, [5] * 7 + [0] * 3, [0] * 10):
      segments = np.stack([ones[0], fine]).astype(np.int32)
      out = one.apply(held, tokens, segment_ids=segments, cache=empty)
      self.assertEqual(out.cache.length.tolist(), [10, sum(np.sign(fine))])
    with self.assertRaisesRegex(ds.InputError, 'row 0 begins with padding'):
      late = np.int32([[0, 1], [1, 0]])
      one.apply(held, tokens[:, :2], segment_ids=late, cache=out.cache)


def padded():
  """Two rows, padding on the left, on the right and between documents."""
  batch = tiny.documents(2, T + 1)
  segments = np.ones((2, T + 1), np.int32)
  segments[0, :3] = segments[0, 17:] = segments[1, 8:12] = 0
  return {**batch, 'segments': segments}


@functools.cache
def gradient(name):
  def loss(params, buffers, batch):
    held = {'params': params, 'buffers': buffers}
    return train.loss_and_metrics(
      tiny.model(name),
      held,
      batch,
      Shares(20.0, 1, 0.3),
      tiny.PRETRAINING,
    )

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


class PaddingTest(parameterized.TestCase):
  def test_it_weighs_nothing(self):
    batch = padded()
    real = batch['segments'] > 0
    inputs = tiny.PRETRAINING.inputs
    weights = np.asarray(inputs(batch).weights)
    np.testing.assert_array_equal(weights, real[:, 1:] & real[:, :-1])
    alone = inputs({'tokens': batch['tokens']}).weights
    np.testing.assert_array_equal(alone, 1)

  def test_what_it_holds_changes_no_loss_load_or_gradient(self):
    batch, held = padded(), tiny.variables('step')
    (want, metrics), grads = gradient('step')(
      held['params'], held['buffers'], batch
    )
    real = batch['segments'] > 0
    self.assertEqual(int(metrics['load'][0].sum()), 3 * int(real[:, :-1].sum()))
    other = np.where(real, batch['tokens'], 7).astype(np.int32)
    (got, again), same = gradient('step')(
      held['params'], held['buffers'], {**batch, 'tokens': other}
    )
    self.assertEqual(float(got), float(want))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, same, grads)
    for name in ('load', 'loss', 'mtp_loss', 'balance_loss', 'entropy'):
      np.testing.assert_array_equal(again[name], metrics[name], err_msg=name)

  def test_a_batch_without_any_is_read_as_ever(self):
    ones = np.ones((2, T + 1), np.int32)
    batch = {'tokens': padded()['tokens'], 'segments': ones}
    whole = lambda batch: train.loss_and_metrics(
      tiny.model('llama'),
      tiny.variables('llama'),
      batch,
      Shares(40.0, 1, 0.3),
      tiny.PRETRAINING,
    )[0]
    alone = {'tokens': batch['tokens']}
    self.assertAlmostEqual(
      float(jax.jit(whole)(batch)), float(jax.jit(whole)(alone)), delta=1e-6
    )

  def test_evaluation_counts_none(self):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    batch = {**padded(), 'weights': np.ones((2, T), np.float32)}
    got = negative_log_likelihood(hidden, head, batch)
    real = batch['segments'][:, 1:] > 0
    log_probs = np.asarray(jax.nn.log_softmax(hidden @ head))
    picked = np.take_along_axis(log_probs, batch['tokens'][:, 1:, None], 2)
    self.assertAlmostEqual(float(got), -picked[..., 0][real].sum(), delta=1e-3)


if __name__ == '__main__':
  absltest.main()
