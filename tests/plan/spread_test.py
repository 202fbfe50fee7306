"""Memory and traffic over a mesh: by hand, and against rings of devices."""

import dataclasses
import fractions

import jax
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import ComputeConfig
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.pipeline.cut import stage_places
from deepseek_jax.plan import device_shares as mesh
from deepseek_jax.plan import memory
from deepseek_jax.plan.wire import expert_wire as traffic
from deepseek_jax.plan.wire import traffic as wire
from deepseek_jax.train.optimizer import OptimizerConfig
from tests import tiny
from tests.parallel import split_worker

D, F, V, E, K = 256, 128, 512, 8, 2
EXPERTS = 3 * E * D * F  # of one layer
BF16 = ComputeConfig('bfloat16', remat='full')


def model(layers=4, depth=0, **fields):
  return ds.TransformerConfig(
    vocab_size=V,
    dim=D,
    layout=((('moe',), layers),),
    attention=GQAConfig(2, 2, 128),
    moe=MoEConfig(E, K, F, shared=0, router=RouterConfig(bias=False)),
    mtp=MTPConfig(depth),
    compute=BF16,
    **fields,
  )


def state(config, grid, training=plan.Training(), rank=0):  # noqa: B008
  return memory.device_bytes(config, grid, training)[rank]


def sent(config, grid, training=plan.Training(), **fields):  # noqa: B008
  fields = {'batch': 64, **fields}
  return plan.traffic(config, grid, training, **fields)


def ring(devices: int, size: int, gather_too: bool) -> int:
  """Bytes that device 0 sends, by walking the steps of a ring."""
  chunk, total = size // devices, 0
  for _ in range(devices - 1):  # reduce-scatter: pass a partial sum on
    total += chunk
  for _ in range((devices - 1) * gather_too):  # all-gather: pass results on
    total += chunk
  return total


class StagesTest(parameterized.TestCase):
  @parameterized.product(stage=(1, 2, 3, 5), depth=(0, 1))
  def test_every_parameter_lies_on_some_stage(self, stage, depth):
    config = model(5, depth)
    grid = plan.Mesh(stage=stage)
    held = mesh.shares(config, grid)
    runs = stage_places(config, grid.stage)
    self.assertEqual({p for run in runs for p in run}, set(held))
    sizes = [sum(p[0] in ('block', 'mtp') for p in run) for run in runs]
    self.assertEqual(sum(sizes), 5 + depth)
    self.assertLessEqual(max(sizes) - min(sizes), 1)
    self.assertIn(('end',), runs[-1])
    self.assertEqual(('start',) in runs[-1], stage == 1 or depth > 0)

  def test_a_dualpipe_rank_holds_a_stage_from_each_end(self):
    config, grid = model(8), plan.Mesh(stage=4)
    one = mesh.ranks(config, grid)
    two = mesh.ranks(config, grid, both_ends=True)
    self.assertEqual(two[1], one[1] + one[2])
    self.assertEqual(set(two[0]), set(two[3]))

  def test_more_stages_than_blocks(self):
    with self.assertRaisesRegex(ds.InputError, 'mesh.stage = 9'):
      stage_places(model(4), 9)

  def test_wrong_axes_are_named(self):
    with self.assertRaisesRegex(ds.InputError, 'mesh.model'):
      plan.mesh_of({'model': 2})
    with self.assertRaisesRegex(ds.InputError, 'mesh.data = 0'):
      plan.Mesh(data=0)


class StateTest(parameterized.TestCase):
  def test_one_device_in_float32_holds_four_copies(self):
    config = dataclasses.replace(model(), compute=ComputeConfig())
    total = plan.count_parameters(config).total
    got = state(config, plan.Mesh())
    want = {'weights': 4, 'master weights': 0, 'gradients': 4, 'moments': 8}
    self.assertEqual({k: got[k] / total for k in want}, want)

  def test_bfloat16_adds_a_copy_of_all_but_norms_and_router(self):
    config = model()
    total = plan.count_parameters(config).total
    float32 = 4 * (2 * D + D * E) + D
    got = state(config, plan.Mesh())
    self.assertEqual(got['weights'], 2 * (total - float32) + 4 * float32)
    # Norms and router have no second copy.
    self.assertEqual(got['master weights'], 4 * (total - float32))

  def test_zero_splits_over_those_that_hold_the_same(self):
    config, grid = model(), plan.Mesh(data=4, expert=8)
    total = plan.count_parameters(config).total
    experts = 4 * EXPERTS
    got = state(config, grid, plan.Training(zero=1))
    self.assertEqual(got['gradients'], 4 * (total - experts + experts // 8))
    want = (total - experts) // 32 + experts // 8 // 4
    self.assertEqual(got['moments'], 8 * want)
    self.assertEqual(got['master weights'], 4 * want)

  def test_moments_take_the_optimizers_dtype(self):
    total = plan.count_parameters(model()).total
    for dtype, width in (('float32', 8), ('bfloat16', 4)):
      run = plan.Training(optimizer=OptimizerConfig(moments=dtype))
      got = state(model(), plan.Mesh(), run)
      self.assertEqual(got['moments'], width * total)

  def test_dualpipe_doubles_weights_and_not_zeros_share(self):
    config, run = model(8), plan.Training(zero=1)
    pair = dataclasses.replace(run, schedule='dualpipe')
    one = memory.device_bytes(config, plan.Mesh(stage=4, data=2), run)
    two = memory.device_bytes(config, plan.Mesh(stage=4, data=2), pair)
    self.assertEqual(two[1]['weights'], 2 * one[1]['weights'])
    self.assertEqual(two[1]['gradients'], 2 * one[1]['gradients'])
    self.assertEqual(two[1]['moments'], one[1]['moments'])


class ActivationsTest(parameterized.TestCase):
  T = 64

  def kept(self, grid=None, schedule='1f1b', **fields):
    run = plan.Training(self.T, schedule=schedule, **fields)
    config, grid = model(8), grid or plan.Mesh()
    ranks = range(grid.stage)
    return [memory.activation_bytes(config, grid, run, r) for r in ranks]

  def test_full_remat_keeps_inputs_and_one_block(self):
    block = model().block('moe')
    one = memory.kept_bytes(model(), block, self.T)
    row = 2 * self.T * D
    self.assertEqual(self.kept(), [8 * row + one.none - row])
    self.assertEqual(self.kept(micro_batch=3), [3 * (7 * row + one.none)])

  def test_1f1b_keeps_a_micro_batch_per_later_stage(self):
    row = 2 * self.T * D
    most = memory.kept_bytes(model(), model().block('moe'), self.T).none - row
    got = self.kept(plan.Mesh(stage=4))
    self.assertEqual([(g - most) // (2 * row) for g in got], [4, 3, 2, 1])

  def test_dualpipe_keeps_one_chunk_more(self):
    row = 2 * self.T * D
    most = memory.kept_bytes(model(), model().block('moe'), self.T).none - row
    got = self.kept(plan.Mesh(stage=4), 'dualpipe')
    self.assertEqual([(g - most) // (2 * row) for g in got], [5] * 4)

  def test_dualpipe_keeps_more_of_the_earlier_stage(self):
    grid = plan.Mesh(stage=4)
    run = plan.Training(self.T, schedule='dualpipe')
    alive = [memory._chunks_alive(grid, run, rank) for rank in range(4)]
    self.assertEqual(alive, [[4, 1], [3, 2], [2, 3], [1, 4]])

  def test_context_axes_divide_it(self):
    self.assertEqual(self.kept(plan.Mesh(context=4)), [self.kept()[0] // 4])

  def test_inputs_are_whole_on_every_device_of_a_tensor_axis(self):
    row = 2 * self.T * D
    block = model().block('moe')
    whole, half = (
      memory.kept_bytes(model(), block, self.T, tensor) for tensor in (1, 2)
    )
    self.assertEqual((whole.full, half.full), (row, row))
    self.assertBetween(half.none, whole.none / 2, whole.none - 1)
    got = self.kept(plan.Mesh(tensor=2))
    self.assertEqual(got, [8 * row + half.none - row])

  @parameterized.parameters('mha', 'dsa', 'nsa', 'window', 'csa', 'hca')
  def test_heads_of_every_attention_are_cut(self, name):
    attention = split_worker.LAYERS[name]
    config = dataclasses.replace(tiny.config('mla'), attention=attention)
    whole, half = (
      memory.kept_bytes(config, config.block('dense'), self.T, tensor)
      for tensor in (1, 2)
    )
    self.assertEqual(whole.full, half.full)
    self.assertLess(half.none, whole.none)
    # Both sublayers' inputs, float32, are whole.
    uncut = 4 * self.T * 2 * tiny.DIM
    self.assertGreaterEqual(2 * half.none, whole.none + uncut)


class ExchangeTest(parameterized.TestCase):
  # 64 tokens of K = 2; on 8 devices of one expert each no buffer is longer
  # than a device's tokens, on 4 of two experts, twice that.
  @parameterized.parameters(
    (8, 1.0, 16), (8, 2.0, 32), (8, 5.0, 64), (4, 2.0, 64), (4, 9.0, 128)
  )
  def test_buffers_are_those_of_the_exchange(self, n, factor, rows):
    run = plan.Training(64, exchange_factor=factor)
    got = memory.exchange_bytes(model(), plan.Mesh(expert=n), run)
    self.assertEqual(got, n * rows * (2 * D + 2 * D))
    # What the exchange itself sends to the others.
    sizes = 64, K, E, n
    sends = traffic.buffers(ExchangeConfig(factor=factor), *sizes)
    self.assertEqual(sends['fast'], (n - 1) * rows)

  def test_the_factor_is_the_exchanges_by_default(self):
    want = plan.Training(exchange_factor=ExchangeConfig().factor)
    self.assertEqual(plan.Training(), want)
    with self.assertRaisesRegex(ds.InputError, 'exchange_factor = 0'):
      plan.Training(exchange_factor=0)


class TrafficTest(parameterized.TestCase):
  @parameterized.parameters(2, 4, 8)
  def test_gradients_of_data_parallelism(self, n):
    config = model()
    total = plan.count_parameters(config).total
    for often in (1, 3):  # micro-batches, each of which sums
      got = sent(config, plan.Mesh(data=n), batch=often * n).wires
      self.assertLen(got, 1)
      # Parameters of odd sizes are rounded down one by one.
      want = often * ring(n, 4 * total, True)
      self.assertAlmostEqual(got[0].bytes, want, delta=64 * often)

  def test_zero_gathers_weights_in_the_compute_dtype(self):
    config, grid = model(), plan.Mesh(data=4)
    run = plan.Training(zero=1)
    for often in (1, 2):  # gradients per micro-batch, weights per step
      plain = sent(config, grid, batch=4 * often).wires[0].bytes
      zero = sent(config, grid, run, batch=4 * often).wires[0].bytes
      want = (2 * often + 1) / (4 * often)
      self.assertAlmostEqual(zero / plain, want, delta=0.01)

  def test_dualpipes_two_ranks_of_a_stage_add_up_their_gradients(self):
    config, grid = model(8), plan.Mesh(stage=4, data=2)
    run = plan.Training(64, schedule='dualpipe')
    held = mesh.shares(config, grid)
    ranks = mesh.ranks(config, grid, both_ends=True)
    whole = max(sum(s.whole for p in r for s in held[p]) for r in ranks)
    got = {w.purpose: w.bytes for w in sent(config, grid, run).wires}
    want = ring(4, 4 * whole, True)
    self.assertAlmostEqual(got['gradients over data+stage'], want, delta=64)

  def test_a_pipelines_ranks_sum_gradients_once_per_step(self):
    grid, run = plan.Mesh(stage=2, data=2), plan.Training(64)
    one, many = (
      [w.bytes for w in sent(model(), grid, run, batch=batch).wires[:1]]
      for batch in (2, 32)
    )
    self.assertEqual(one, many)

  def test_fsdp_gathers_layers_twice_and_scatters_once_per_micro_batch(self):
    config, grid = model(), plan.Mesh(fsdp=4)
    run = plan.Training(64)
    held = mesh.shares(config, grid)
    split = [s for found in held.values() for s in found if 'fsdp' in s.over]
    want, micro = 0, 16 // 4
    for s in split:
      # Embedding and head are the same for all micro-batches.
      often = 2 * micro if s.name.startswith('segments.') else 1
      want += often * ring(4, 2 * s.whole, False)
      want += micro * ring(4, 4 * s.whole, False)
    got = {w.purpose: w.bytes for w in sent(config, grid, run, batch=16).wires}
    self.assertEqual(got['weights over fsdp'], want)

  @parameterized.parameters((2, 8), (8, 8), (8, 4), (8, 2))
  def test_copies_of_tokens_by_sending_them(self, expert, node):
    """Every choice of K experts by a token of every device, counted."""
    moe = model().moe
    devices = range(expert)
    per = E // expert
    fast = slow = 0
    for home in devices:
      for first in range(E):  # each expert is chosen first, then uniformly
        to = first // per
        if to == home:
          continue
        if to // node == home // node:
          fast += 1
        else:
          slow += 1
    scale = fractions.Fraction(K, expert * E)
    got = wire.rows_sent(moe, expert, node, node_limited=False)
    self.assertEqual(got, {'fast': fast * scale, 'slow': slow * scale})

  def test_a_token_crosses_to_a_node_once(self):
    v3 = ds.presets.v3().moe
    flat = wire.rows_sent(v3, 64, 8, node_limited=False)
    two_hops = wire.rows_sent(v3, 64, 8, node_limited=True)
    self.assertEqual(flat['slow'], 7)  # 8 experts, 7 of 8 nodes are others
    self.assertEqual(two_hops['slow'], fractions.Fraction(7, 2))  # 4 nodes
    self.assertEqual(two_hops['fast'], 7)

  @parameterized.parameters(('bfloat16', 2 * D), ('float8', D + 4 * D // 128))
  def test_dispatch_and_combine(self, dtype, row):
    config, grid = model(), plan.Mesh(expert=4)
    run = plan.Training(64, dispatch=dtype)
    got = {w.purpose: w for w in sent(config, grid, run, batch=8).wires}
    tokens = 64 * 8 // 4
    # Forward twice and back, 4 layers, 3 of 4 away.
    copies = 3 * 4 * tokens * K * 3 // 4
    self.assertEqual(got['expert dispatch'].bytes, copies * row)
    self.assertEqual(got['expert combine'].bytes, copies * 2 * D)
    self.assertEqual(got['expert dispatch'].link, 'fast')

  @parameterized.parameters(('none', 2, 2), ('dots', 3, 2), ('full', 3, 2))
  def test_what_recomputing_sends_again(self, remat, passes, added):
    config = ds.changed(model(depth=1), {'compute.remat': remat})
    for node_limited in (False, True):
      got = {
        (w.purpose, w.link): w.bytes
        for w in sent(
          config,
          plan.Mesh(expert=4),
          plan.Training(64),
          batch=8,
          node=2,
          node_limited=node_limited,
        ).wires
      }
      rows = wire.rows_sent(config.moe, 4, 2, node_limited)
      for kind, link in ((k, l) for k in ('dispatch', 'combine') for l in rows):
        # Sums of a node are not made again; prediction runs once.
        summed = node_limited and (kind, link) == ('combine', 'slow')
        layers = 4 * (added if summed else passes) + 2
        self.assertEqual(
          got[f'expert {kind}', link], 64 * 2 * rows[link] * layers * 2 * D
        )

  def test_tensor_context_and_stage(self):
    config, run = model(), plan.Training(64)
    at = lambda **sizes: {
      w.purpose: w.bytes
      for w in sent(config, plan.Mesh(**sizes), run, batch=8).wires
    }
    row = 2 * D
    tokens = 64 * 8
    # Forward twice and back, of 4 layers attention and experts; lookups and
    # the head's hidden states. Weights of K experts, and three numbers of
    # logits, are float32.
    numbers = (4 * (2 * 2 + 2) + 2) * row + 4 * (4 * K + 3)
    self.assertEqual(at(tensor=2)['tensor'], ring(2, tokens * numbers, True))
    keys = 4 * 2 * 2 * 128 * 2  # layers, keys and values, heads, bfloat16
    once = ring(4, tokens * keys, False)
    self.assertEqual(at(context=4)['context'], 3 * once)
    self.assertEqual(at(stage=4)['stages'], 2 * tokens * row)
    config = ds.changed(config, {'compute.remat': 'none'})
    self.assertEqual(at(context=4)['context'], 2 * once)

  @parameterized.parameters('dsa', 'dsa_dense', 'nsa', 'window', 'csa', 'hca')
  def test_sums_inside_sparse_attention_are_said_to_be_left_out(self, name):
    attention = split_worker.LAYERS[name]
    config = dataclasses.replace(tiny.config('mla'), attention=attention)
    grid, kind = plan.Mesh(tensor=2), type(attention).__name__
    (got,) = (w for w in sent(config, grid).wires if w.purpose == 'tensor')
    self.assertEndsWith(got.formula, f'NOT COUNTED: sums inside {kind}')
    # Of attention the sum of the output alone.
    numbers = 2 * (1 + 2) * tiny.DIM + 2 * tiny.DIM + 3
    tokens = 64 * plan.Training().seq_len
    self.assertEqual(got.bytes, ring(2, tokens * 4 * numbers, True))
    (got,) = (
      w for w in sent(tiny.config('mla'), grid).wires if w.purpose == 'tensor'
    )
    self.assertNotIn('NOT COUNTED', got.formula)

  def test_stages_pass_on_every_stream(self):
    config = dataclasses.replace(model(), residual=HyperConnectionsConfig(3))
    run = plan.Training(64)
    x = jax.ShapeDtypeStruct((8, 64, D), 'bfloat16')
    stream = jax.eval_shape(config.residual.expand, x)
    got = {
      w.purpose: w.bytes
      for w in sent(config, plan.Mesh(stage=4), run, batch=8).wires
    }
    self.assertEqual(got['stages'], 2 * 2 * stream.size)

  def test_wide_axes_use_the_slow_link(self):
    config = model()
    for n, link in ((8, 'fast'), (16, 'slow')):
      got = sent(config, plan.Mesh(data=n)).wires[0]
      self.assertEqual(got.link, link)
    both = sent(config, plan.Mesh(data=2, fsdp=8))
    self.assertEqual(
      {w.purpose: w.link for w in both.wires},
      {
        'gradients over data': 'slow',
        'gradients over data+fsdp': 'slow',
        'weights over fsdp': 'fast',
      },
    )

  @parameterized.parameters(
    ({'tensor': 2}, 4),
    ({'tensor': 2, 'context': 2}, 2),
    ({'tensor': 4, 'context': 2}, 1),
    ({'tensor': 2, 'context': 8}, 1),
  )
  def test_faster_axes_leave_experts_fewer_devices_of_a_node(self, axes, near):
    config, run = model(), plan.Training(64)
    config = dataclasses.replace(config, attention=GQAConfig(4, 4, 128))
    at = lambda node_limited: {
      w.link: w.bytes
      for w in sent(
        config, plan.Mesh(expert=8, **axes), run, node_limited=node_limited
      ).wires
      if w.purpose == 'expert dispatch'
    }
    for node_limited in (False, True):
      got = at(node_limited)
      rows = wire.rows_sent(config.moe, 8, near, node_limited)
      tokens = 64 * 64 // 8 // axes.get('context', 1)
      each = 3 * 4 * tokens * 2 * D  # passes, layers, bfloat16
      want = {link: int(each * rows[link]) for link in rows if rows[link]}
      self.assertEqual(got, want)
    self.assertEqual('fast' in got, near > 1)

  def test_one_device_sends_nothing(self):
    self.assertEqual(sent(model(), plan.Mesh()).wires, ())

  def test_dense_models_have_no_expert_traffic(self):
    config = dataclasses.replace(
      model(), layout=((('dense',), 2),), ffn=FFNConfig(512)
    )
    purposes = [w.purpose for w in sent(config, plan.Mesh(expert=4)).wires]
    self.assertEqual(purposes, ['gradients over expert'])


if __name__ == '__main__':
  absltest.main()
