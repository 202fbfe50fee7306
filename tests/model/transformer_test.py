"""Properties of whole models, and every family against float64 NumPy."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model import block as blocks
from deepseek_jax.model import cache as caching
from deepseek_jax.model import context, mtp, norm, residual
from deepseek_jax.model.attention import gqa, mla
from deepseek_jax.model.context import positions_in
from deepseek_jax.model.experts import ffn, moe
from deepseek_jax.model.experts import router as routers
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.stacks import unstack
from deepseek_jax.model.transformer_config import Kind
from tests import reference, tiny

T = 24


@functools.cache
def built(name, **compute):
  cfg = ds.changed(
    tiny.config(name), {f'compute.{k}': v for k, v in compute.items()}
  )
  return ds.build(cfg)


@functools.cache
def prompt(rows=2):
  return jnp.asarray(tiny.tokens(rows, T))


def forward(name, tokens, **arrays):
  """The jitted model with MTP, always with documents: one compilation."""
  tokens = jnp.asarray(tokens)
  whole = {
    'positions': jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    'segment_ids': jnp.ones_like(tokens),
  }
  return tiny.jitted(name, mtp=True)(
    tiny.variables(name), tokens, **{**whole, **arrays}
  )


def logits(name, out, depth=0):
  """Of the main model, or of an MTP depth."""
  if not depth:
    return out.logits
  head = tiny.model(name).head(tiny.variables(name))
  return out.aux['mtp_hidden'][depth - 1] @ head


class ReferenceTest(parameterized.TestCase):
  @parameterized.parameters('v3', 'v2', 'mixed', 'llama', 'mla_lite', 'mha')
  def test_equals_float64_with_documents_and_padding(self, name):
    cfg, batch = tiny.config(name), tiny.documents(2, T, padding=4)
    out = forward(
      name,
      batch['tokens'],
      positions=batch['positions'],
      segment_ids=batch['segments'],
    )
    weights = reference.to_float64(tiny.variables(name))
    loads = 0
    for row in range(2):
      hidden, states, trace = reference.forward(
        cfg,
        weights,
        *(batch[k][row] for k in ('tokens', 'positions', 'segments')),
      )
      want = [hidden @ reference.head(cfg, weights)]
      want += [s @ reference.head(cfg, weights) for s in states]
      used = batch['segments'][row] > 0
      for depth, value in enumerate(want):
        got = logits(name, out, depth)[row]
        # float32 through three or four blocks.
        self.assertLess(tiny.relative(got[used], value[used]), 1e-5)
      loads = loads + np.array(trace.loads)
    load = ds.moe_statistics(out.aux, 'load')
    if load is None:
      self.assertIsNone(tiny.config(name).moe)
      return
    np.testing.assert_array_equal(load, loads[: len(load)])
    mtp = [s for s in out.aux.get('mtp', []) if 'load' in s['ffn']]
    self.assertLen(loads, len(load) + len(mtp))
    for depth, stats in enumerate(mtp):
      np.testing.assert_array_equal(
        stats['ffn']['load'], loads[len(load) + depth]
      )

  def test_bfloat16_follows_float32(self):
    # Dense, as rounding may move a router's choice.
    low = built('llama', dtype='bfloat16')
    out = jax.jit(low.apply)(tiny.variables('llama'), prompt())
    want = forward('llama', prompt()).logits
    self.assertEqual(out.logits.dtype, jnp.float32)
    self.assertEqual(out.hidden.dtype, jnp.bfloat16)
    # Roundings to 8 bits through two blocks.
    self.assertLess(tiny.relative(out.logits, want), 4e-2)

  def test_what_full_precision_names_stays_float32_in_bfloat16(self):
    low = built('v3', dtype='bfloat16')
    shapes = jax.eval_shape(low.cast, tiny.variables('v3'))['params']
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      exact = name.endswith('scale') or 'router' in name
      want = jnp.float32 if exact else jnp.bfloat16
      self.assertEqual(leaf.dtype, want, name)


class CausalityTest(parameterized.TestCase):
  @parameterized.parameters('v3', 'mixed', 'llama', 'mla_lite', 'mqa')
  def test_a_token_changes_no_logit_before_it(self, name):
    t = 11
    before = forward(name, prompt())
    changed = prompt().at[:, t].set((prompt()[:, t] + 7) % tiny.VOCAB)
    after = forward(name, changed)
    for depth in range(tiny.config(name).mtp.depth + 1):
      a, b = (np.asarray(logits(name, o, depth)) for o in (before, after))
      # Depth k has read k tokens ahead.
      np.testing.assert_array_equal(a[:, : t - depth], b[:, : t - depth])
      self.assertGreater(np.abs(a - b)[:, t - depth].max(), 1e-3)

  @parameterized.parameters('v3', 'mixed', 'llama', 'mla_lite', 'mqa')
  def test_documents_do_not_leak_into_each_other(self, name):
    rows = np.asarray(prompt())
    cut = 10
    segments = np.ones_like(rows)
    segments[:, cut:] = 2
    positions = np.concatenate([np.arange(cut), np.arange(T - cut)])
    arrays = {
      'positions': np.broadcast_to(positions, rows.shape),
      'segment_ids': segments,
    }
    both = forward(name, rows, **arrays)
    other = rows.copy()
    other[:, :cut] = rows[:, :cut][:, ::-1]
    second = forward(name, other, **arrays)
    other = rows.copy()
    other[:, cut:] = rows[:, cut:][:, ::-1]
    first = forward(name, other, **arrays)
    for depth in range(tiny.config(name).mtp.depth + 1):
      a, b, c = (
        np.asarray(logits(name, o, depth)) for o in (both, second, first)
      )
      end = T - depth  # what follows is padding
      np.testing.assert_array_equal(a[:, cut:end], b[:, cut:end])
      np.testing.assert_array_equal(a[:, : cut - depth], c[:, : cut - depth])
      self.assertGreater(np.abs(a - b)[:, : cut - depth].max(), 1e-3)
    # And a document reads as if it were alone.
    alone = rows.copy()
    alone[:, : T - cut] = rows[:, cut:]
    out = forward(name, alone)
    np.testing.assert_allclose(
      out.logits[:, : T - cut], both.logits[:, cut:], atol=2e-5
    )


class DecodeTest(parameterized.TestCase):
  @parameterized.parameters('mla', 'mla_lite', 'mha', 'gqa', 'mqa')
  def test_prefill_chunk_and_steps_equal_forward_for_ragged_rows(self, name):
    """Rows of 9 and 5 tokens, a padded chunk, then tokens one at a time."""
    want = forward(name, prompt()).logits
    rows, variables = np.asarray(prompt()), tiny.variables(name)
    run = tiny.jitted(name)
    cache = tiny.model(name).init_cache(2, T)
    done = np.array([0, 0])
    # Expanded, then wide (expanded over the cache), narrow (absorbed), single.
    for width, news in ((9, (9, 5)), (16, (6, 10)), (4, (3, 4)), (1, (1, 1))):
      chunk = np.full((2, width), 1, np.int32)
      valid = np.zeros((2, width), np.int32)
      for b, new in enumerate(news):
        chunk[b, :new] = rows[b, done[b] : done[b] + new]
        valid[b, :new] = 1
      positions = done[:, None] + np.arange(width)
      out = run(
        variables,
        chunk,
        cache=cache,
        segment_ids=valid,
        positions=positions,
      )
      for b, new in enumerate(news):
        np.testing.assert_allclose(
          out.logits[b, :new],
          want[b, done[b] : done[b] + new],
          atol=2e-5,
          rtol=1e-5,
        )
      done, cache = done + news, out.cache
      np.testing.assert_array_equal(cache.length, done)
    # Without positions and segments a step goes on where its row is.
    for _ in range(3):
      token = rows[np.arange(2), done][:, None]
      out = run(variables, token, cache=cache)
      np.testing.assert_allclose(
        out.logits[:, 0], want[np.arange(2), done], atol=2e-5, rtol=1e-5
      )
      done, cache = done + 1, out.cache

  def test_the_absorbed_and_the_expanded_form_both_took_part(self):
    module = mla.MLA(tiny.MLA, 16, std=1.0, rngs=nnx.Rngs(0))
    self.assertTrue(module.absorbing_pays(4))
    self.assertFalse(module.absorbing_pays(16))

  def test_prompts_longer_than_the_cache_are_refused(self):
    cache = tiny.model('gqa').init_cache(1, 8)
    with self.assertRaisesRegex(
      ds.InputError, '9 tokens after 0 do not fit a cache of 8 slots; make it'
    ):
      tiny.model('gqa').apply(
        tiny.variables('gqa'), jnp.ones((1, 9), jnp.int32), cache=cache
      )

  def test_tokens_beyond_a_cache_are_refused_where_its_length_is_known(self):
    model, variables = tiny.model('gqa'), tiny.variables('gqa')
    out = model.apply(
      variables, tiny.tokens(1, 8), cache=model.init_cache(1, 8)
    )
    with self.assertRaisesRegex(ds.InputError, '1 tokens after 8 do not fit'):
      model.apply(variables, tiny.tokens(1, 1), cache=out.cache)

  def test_write_puts_valid_tokens_at_their_slots(self):
    buffer = jnp.zeros((2, 4, 1))
    new = jnp.arange(1.0, 7).reshape(2, 3, 1)
    at = jnp.array([[1, 2, 3], [3, 4, 5]])
    valid = jnp.array([[True, True, False], [True, True, True]])
    got = caching.write(buffer, new, at, valid)
    np.testing.assert_array_equal(got[..., 0], [[0, 1, 2, 0], [0, 0, 0, 4]])


def gradient(model):
  """Of a scalar that reads the logits and the balance losses.

  Few tokens: with them a MoE layer compiles fastest.
  """

  def total(params):
    variables = {**tiny.variables('step'), 'params': params}
    out = model.apply(variables, prompt()[:, :8])
    balance = sum(
      s['ffn']['loss'].sum()
      for patterns in out.aux['segments']
      for s in patterns
    )
    probs = jax.nn.log_softmax(out.logits)[..., 3].mean()
    return probs + balance, out

  params = tiny.variables('step')['params']
  (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return out, grads


@functools.cache
def scanned():
  return gradient(tiny.model('step'))


class FormsTest(parameterized.TestCase):
  @parameterized.parameters(
    {'scan': False}, {'remat': 'dots'}, {'remat': 'full'}
  )
  def test_scan_and_remat_change_no_number(self, **compute):
    want, want_grads = scanned()
    out, grads = gradient(built('step', **compute))
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)
    jax.tree.map(close, out.logits, want.logits)
    jax.tree.map(close, out.aux, want.aux)
    jax.tree.map(close, grads, want_grads)

  def test_unstacked_equals_stacked(self):
    name = 'mixed'  # two blocks in a pattern that repeats
    cfg = unstack(tiny.config(name))
    self.assertEqual(cfg.layers, tiny.config(name).layers)
    self.assertEqual({s.repeat for s in cfg.segments()}, {1})
    flat = ds.build(cfg)
    variables = unstack(tiny.config(name), tiny.variables(name))
    shapes = {k: nnx.to_pure_dict(v) for k, v in flat.abstract.items()}
    self.assertEqual(
      jax.tree.map(np.shape, variables), jax.tree.map(np.shape, shapes)
    )
    out = jax.jit(functools.partial(flat.apply, mtp=True))(variables, prompt())
    want = forward(name, prompt())
    np.testing.assert_allclose(out.logits, want.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(
      ds.moe_statistics(out.aux, 'load'), ds.moe_statistics(want.aux, 'load')
    )

  def test_statistics_come_in_layer_order(self):
    out = forward('mixed', prompt())
    chosen = ds.moe_statistics(out.aux, 'experts')
    self.assertEqual(chosen.shape, (2, 2, T, 3))
    np.testing.assert_array_equal(
      chosen, out.aux['segments'][0][1]['ffn']['experts']
    )
    self.assertIsNone(ds.moe_statistics(forward('llama', prompt()).aux, 'load'))

  def test_tied_models_have_one_matrix(self):
    self.assertNotIn('head', tiny.variables('mixed')['params'])
    np.testing.assert_array_equal(
      tiny.model('mixed').head(tiny.variables('mixed')),
      tiny.variables('mixed')['params']['embed'].T,
    )

  def test_init_makes_float32_normals_of_the_given_width(self):
    cfg = dataclasses.replace(tiny.config('step'), init_std=0.006, dim=64)
    variables = jax.jit(ds.build(cfg).init)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      self.assertEqual(leaf.dtype, jnp.float32, name)
      if name.endswith('scale'):
        np.testing.assert_array_equal(leaf, 1, name)
      elif name.endswith('bias'):
        np.testing.assert_array_equal(leaf, 0, name)
      else:
        deviation = float(jnp.std(leaf)) / 0.006
        self.assertAlmostEqual(deviation, 1, delta=5 / leaf.size**0.5)
    stack = variables['params']['segments'][0][0]['attention']['out']
    self.assertGreater(float(jnp.abs(stack[0] - stack[1]).max()), 0)


def modules():
  """Every module class of the library, made small, as (weights, x) -> out."""
  cfg = tiny.config('v3')
  at = jnp.broadcast_to(jnp.arange(8), (2, 8))
  ctx = context.Context(prompt()[:, :8], at, jnp.ones_like(at), train=True)
  make = {'std': 0.3, 'rngs': nnx.Rngs(0)}
  block = cfg.block('moe')
  streams = dataclasses.replace(
    block, residual=HyperConnectionsConfig(streams=2)
  )
  cases = {
    norm.RMSNorm(16, rngs=nnx.Rngs(0)): lambda m, x: m(x),
    mla.MLA(tiny.MLA, 16, **make): lambda m, x: m(x, ctx),
    gqa.GQA(tiny.ATTENTIONS['gqa'], 16, **make): lambda m, x: m(x, ctx),
    ffn.FFN(cfg.ffn, 16, **make): lambda m, x: m(x, ctx),
    routers.Router(cfg.moe.router, 16, 8, 3, **make): lambda m, x: m(x, ctx),
    moe.MoE(cfg.moe, 16, **make): lambda m, x: m(x, ctx),
    blocks.Block(block, 16, **make): lambda m, x: m(x, ctx),
    mtp.MTP(block, 16, **make): lambda m, x: m(x, -x, ctx),
    mtp.StreamMTP(streams, 16, **make): lambda m, x: m(
      jnp.stack([x, -x], axis=2), x, ctx
    ),
  }
  return {type(module): (module, call) for module, call in cases.items()}


def unplaced(program):
  """A program's text without the addresses of functions."""
  return re.sub(r' at 0x\w+', '', str(program))


class PurityTest(parameterized.TestCase):
  def test_no_module_is_left_out(self):
    found = {
      cls
      for lib in (norm, mla, gqa, ffn, routers, moe, blocks, mtp, residual)
      for _, cls in inspect.getmembers(lib, inspect.isclass)
      if issubclass(cls, nnx.Module) and cls.__module__ == lib.__name__
    }
    # The residual has no weights and is called through the block.
    self.assertEqual(found, {*modules(), residual.Residual})

  def test_calling_a_module_twice_gives_the_same_and_changes_nothing(self):
    x = np.random.default_rng(0).normal(size=(2, 8, 16))
    x = jnp.asarray(x, jnp.float32)
    for cls, (module, call) in modules().items():
      with self.subTest(cls.__name__):
        copy = lambda m: jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(m)))
        before = copy(module)
        # Equal programs over equal numbers; nothing is left to be computed.
        first, second = (
          jax.make_jaxpr(lambda x, m=module, f=call: f(m, x))(x) for _ in '12'
        )
        self.assertEqual(unplaced(first), unplaced(second))
        jax.tree.map(np.testing.assert_array_equal, first.consts, second.consts)
        jax.tree.map(np.testing.assert_array_equal, before, copy(module))

  def test_the_model_twice(self):
    first, second = (forward('v3', prompt()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


class ArgumentsTest(parameterized.TestCase):
  def test_positions_start_anew_in_each_document(self):
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4]])
    np.testing.assert_array_equal(
      positions_in(segments), [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    )

  @parameterized.parameters(
    (jnp.ones((2, 3)), r'tokens: float32\[2, 3\]; must be integers'),
    (jnp.ones(3, jnp.int32), r'tokens: int32\[3\]; must be integers'),
  )
  def test_tokens_of_another_kind_are_refused(self, tokens, message):
    with self.assertRaisesRegex(ds.InputError, message):
      tiny.model('gqa').apply(tiny.variables('gqa'), tokens)

  @parameterized.parameters(
    ({'vocab_size': 0}, 'vocab_size = 0'),
    ({'layout': ()}, r'layout = \(\): name at least one block'),
    ({'layout': ((('dence',), 1),)}, "layout names 'dence'"),
    ({'layout': (('dense', 1),)}, r"layout entry \('dense', 1\): write"),
    ({'layout': ((('dense',), 0),)}, 'layout entry'),
    ({'layout': ('dense',)}, 'layout entry'),
    ({'ffn': None}, "'dense', which needs ffn = ...: it is None"),
    ({'kinds': {'dense': Kind('ffn', (('atention.heads', 2),))}}, 'atention'),
  )
  def test_configurations_that_mean_nothing_are_refused(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      dataclasses.replace(tiny.config('llama'), **fields)

  def test_a_kind_changes_one_layer_alone(self):
    cfg = dataclasses.replace(
      tiny.config('llama'),
      layout=((('dense', 'wide'), 2),),
      kinds={
        'dense': Kind('ffn'),
        'wide': Kind('ffn', (('attention.heads', 8), ('ffn.width', 40))),
      },
    )
    plain, wide = cfg.segments()[0].blocks
    self.assertEqual((plain.attention.heads, plain.ffn.width), (4, 24))
    self.assertEqual((wide.attention.heads, wide.ffn.width), (8, 40))
    self.assertEqual(cfg.layers, 4)


if __name__ == '__main__':
  absltest.main()
