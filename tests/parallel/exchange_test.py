"""Tokens that travel to experts give what experts on one device give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.transformer_config import ComputeConfig
from deepseek_jax.parallel import exchange, formats, queues, rounds, wires
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.plan.wire import expert_wire as traffic
from deepseek_jax.plan.wire import traffic as wire
from tests import fake_devices
from tests.scale import exchanges

FAST = ('two_hop',)
SLOW = tuple(sorted(set(exchanges.CASES) - set(FAST)))
# Of the greatest value. The wire's format rounds an output once, by 2^-9 or
# 2^-4, and the two factors of a weight's gradient.
TOLERANCE = {'bfloat16': 2**-7, 'float8': 2**-3}


@functools.cache
def results(names):
  return fake_devices.run('tests.scale.exchanges', *names)


class ExchangeCase(parameterized.TestCase):
  def holds(self, name, found):
    even, skewed = found
    for case in found:
      if name != 'dropping':
        self.assertLess(case['y'], TOLERANCE.get(name, 2e-6))
        self.assertLess(case['gradients'], TOLERANCE.get(name, 2e-6))
    if name in ('small_buffers', 'dropping', 'all_to_all'):
      for case in found:
        self.assertEqual(case['missed'], case['expected'])
      self.assertGreater(skewed['missed'], even['missed'])
    # float8's scales travel beside it.
    if name not in ('local', 'ragged', 'odd_batch', 'float8'):
      self.assertEqual(even['sent'], even['planned'])
    if name in ('ragged', 'four_nodes'):
      self.assertGreater(skewed['missed'], 0)
    if name in TOLERANCE:
      self.assertEqual(even['missed'], 0)
      self.assertGreater(even['y'], 1e-4)  # it was rounded at all


class ExchangeTest(ExchangeCase):
  @parameterized.parameters(*((name,) for name in FAST))
  def test_equals_experts_on_one_device(self, name):
    self.holds(name, results(FAST)[name])


@pytest.mark.slow
class OtherExchangesTest(ExchangeCase):
  @parameterized.parameters(*SLOW)
  def test_equals_experts_on_one_device(self, name):
    self.holds(name, results(SLOW)[name])


class QueueTest(parameterized.TestCase):
  def test_rounds_carry_every_copy_once_and_in_order(self):
    rng = np.random.default_rng(0)
    to = rng.integers(0, 5, (13, 3)).astype(np.int32)  # 4 is nowhere
    q = queues.queue(jnp.asarray(to), 4)
    longest = int(np.bincount(to.ravel(), minlength=5)[:4].max())
    seen = {d: [] for d in range(4)}
    for turn in range(queues.turns(longest, 3)):
      lane = queues.blocks(q, turn, 3)
      source = np.asarray(lane.plan.source).reshape(4, 3)
      slot = np.asarray(lane.plan.slot).ravel()
      for d in range(4):
        here = source[d][source[d] < to.size]
        seen[d] += here.tolist()
        for row, copy in enumerate(source[d]):
          if copy < to.size:
            self.assertEqual(slot[copy], d * 3 + row)
      self.assertEqual((slot < 12).sum(), (source < to.size).sum())
    for d in range(4):
      self.assertEqual(seen[d], np.flatnonzero(to.ravel() == d).tolist())

  def test_more_copies_than_can_be_sorted_are_refused(self):
    to = jax.ShapeDtypeStruct((2**24, 8), jnp.int32)
    with self.assertRaisesRegex(ds.InputError, '134217728 copies for 64'):
      jax.eval_shape(lambda to: queues.queue(to, 64), to)


class FormatTest(parameterized.TestCase):
  @parameterized.parameters('compute', 'bfloat16', 'float8')
  def test_a_row_has_the_bytes_that_are_counted(self, form):
    x = jax.random.normal(jax.random.key(0), (3, 256), jnp.bfloat16)
    parts = formats.encode(x, form)
    got = sum(p.size * p.dtype.itemsize for p in parts)
    self.assertEqual(got, 3 * formats.row_bytes(256, form, x.dtype))
    back = formats.decode(parts, form, x.dtype)
    self.assertEqual(back.dtype, x.dtype)
    error = jnp.abs(back - x).astype(jnp.float32).max()
    limit = 0.0625 * float(jnp.abs(x).max()) if form == 'float8' else 0
    self.assertLessEqual(float(error), limit)

  @parameterized.parameters('compute', 'bfloat16', 'float8')
  def test_a_gradient_keeps_its_numbers_whatever_its_scale(self, form):
    g = jax.random.normal(jax.random.key(0), (3, 256), jnp.bfloat16)
    carried = jax.jit(
      lambda x: formats.decode(formats.encode(x, form), form, x.dtype)
    )
    want = carried(g)
    for k in (10, 40, 100):
      s = jnp.bfloat16(2.0**-k)
      np.testing.assert_array_equal(carried(g * s), want * s, err_msg=str(k))

  @parameterized.parameters('there', 'back', 'gather', 'scatter')
  def test_float8_wires_floor_tokens_and_no_gradients(self, name):
    # On a group of one device a wire rounds, and sends nothing.
    wire = wires.Wire('x', 1, None, 'float8', 'float8', 'float32')
    extra = () if name in ('gather', 'scatter') else (None,)
    carry = lambda x: getattr(wires, name)(x, *extra, wire)
    mesh = jax.sharding.Mesh(jax.devices()[:1], 'x')
    spec = jax.sharding.PartitionSpec()
    on = lambda f, n: jax.jit(
      jax.shard_map(
        f, mesh=mesh, in_specs=(spec,) * n, out_specs=spec, check_vma=False
      )
    )
    x = jax.random.normal(jax.random.key(0), (4, 256))
    back = on(lambda x, g: jax.vjp(carry, x)[1](g)[0], 2)
    want = back(x, x)
    self.assertLess(float(jnp.abs(want - x).max()), 0.2)
    for k in (20, 40, 90):
      np.testing.assert_array_equal(back(x, x * 2.0**-k), want * 2.0**-k)
    # Numbers of 1e-8 lie under half a step of the least block of tokens.
    self.assertFalse(np.asarray(on(carry, 1)(x * 1e-11)).any())
    free = lambda x: getattr(wires, name)(x, *extra, wire._replace(floor=0.0))
    self.assertTrue(np.asarray(on(free, 1)(x * 1e-11)).any())

  def test_float8_needs_whole_groups(self):
    cfg = ExchangeConfig(dispatch='float8')
    with self.assertRaisesRegex(ds.InputError, 'dim = 100'):
      cfg.check(4, 100)
    cfg.check(4, 256)

  def test_a_cpu_has_no_ragged_exchange(self):
    cfg = ExchangeConfig('ragged_all_to_all')
    with self.assertRaisesRegex(ds.InputError, "use 'all_to_all'"):
      cfg.check(4, 128, 'cpu')
    cfg.check(1, 128, 'cpu')

  def test_nodes_must_divide_the_devices(self):
    with self.assertRaisesRegex(ds.InputError, 'nodes = 3'):
      ExchangeConfig('two_hop', nodes=3).check(8, 128)


E, D, K, DEVICES, NODE = 16, 256, 4, 8, 4
LIMITED = RouterConfig(groups=4, top_groups=2)
MODEL = ds.TransformerConfig(
  vocab_size=64,
  dim=D,
  layout=((('moe',), 3),),
  attention=GQAConfig(2, 2, 32),
  moe=MoEConfig(E, K, 32, router=LIMITED),
  compute=ComputeConfig('bfloat16'),
)


def even_choices():
  """[devices N K]: every expert as often, from every device, on two nodes."""
  half = E // 2
  first = np.arange(half)[:, None] * np.ones(2, int) + [0, 3]
  token = np.concatenate([first % half, half + (first + 1) % half], axis=1)
  return np.broadcast_to(token, (DEVICES, *token.shape))


class TrafficTest(parameterized.TestCase):
  @parameterized.product(two_hop=(False, True), dispatch=('bfloat16', 'float8'))
  def test_bytes_that_cross_equal_the_plan(self, two_hop, dispatch):
    """Rows counted from a routing, over all layers, both ways, there and
    back."""
    choices = even_choices()
    tokens = choices.shape[1]
    got = traffic.crossing(choices, E, DEVICES, node=NODE, two_hop=two_hop)
    kind = 'two_hop' if two_hop else 'all_to_all'
    cfg = ExchangeConfig(kind, dispatch, 'bfloat16')
    each = traffic.row_bytes(cfg, D, jnp.bfloat16) * MODEL.layers
    planned = wire.traffic(
      MODEL,
      plan.Mesh(expert=DEVICES),
      plan.Training(seq_len=tokens, dispatch=dispatch),
      batch=DEVICES,
      node=NODE,
      node_limited=two_hop,
    )
    for link, rows in got._asdict().items():
      want = sum(
        w.bytes
        for w in planned.wires
        if w.purpose.startswith('expert') and w.link == link
      )
      self.assertEqual(rows * each, want * DEVICES, link)

  def test_nowhere_and_home_cross_nothing(self):
    choices = np.full((8, 5, 2), E)
    self.assertEqual(traffic.crossing(choices, E, 8, node=4), (0, 0))
    home = np.repeat(np.arange(8) * 2, 5).reshape(8, 5, 1)
    self.assertEqual(traffic.crossing(home, E, 8, node=4), (0, 0))

  def test_one_copy_crosses_to_a_node_for_all_its_experts(self):
    choices = np.full((8, 1, 4), E)
    choices[0, 0] = [8, 9, 10, 15]  # devices 4 4 5 7, all in node 1
    flat = traffic.crossing(choices, E, 8, node=4)
    self.assertEqual(flat, (0, 4))
    hops = traffic.crossing(choices, E, 8, node=4, two_hop=True)
    self.assertEqual(hops, (2, 1))  # lands on device 4


class RoundsTest(absltest.TestCase):
  def test_further_rounds_keep_the_experts_weights_once(self):
    # Eight devices and 4 copies a token: 3 rounds after the first.
    E, N, D, K = 8, 16, 5, 4
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((E,), ('e',), axis_types=kinds)
    group = rounds.Group(ExchangeConfig(), lambda *_: None, 'e', E, ('e',))

    def step(x, w):
      def local(x, w):
        to = jnp.zeros((N, K), jnp.int32)
        copies = rounds.Copies(to, jnp.ones((N, K)), to + 1, N * K, N * K)
        load = lambda source: (source, ())
        work = lambda rows, *_: (rows @ w[0], jnp.int32(0))
        return rounds.hop(group, x, copies, load, work)[0]

      rows = jax.P('e')
      return jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False
      )(x, w).sum()

    place = jax.sharding.NamedSharding(mesh, jax.P('e'))
    array = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=place)
    with jax.sharding.use_abstract_mesh(mesh):
      made = jax.make_jaxpr(jax.grad(step, (0, 1)))(
        array(E * N, D), array(E, D, D)
      )
    text = str(made)
    self.assertIn('length=3', text)  # the scan over further rounds
    self.assertIn(f'f32[1,{D},{D}]', text)
    self.assertNotIn(f'f32[3,1,{D},{D}]', text)
    self.assertNotIn(f'f32[3,{D},{D}]', text)


class RulesTest(absltest.TestCase):
  def test_hidden_units_on_an_axis_of_tokens_are_refused(self):
    # Their sum would add up outputs of different tokens.
    from jax.sharding import AbstractMesh

    from deepseek_jax.parallel import mesh, sharding

    sizes = {'data': 2}
    grid = AbstractMesh(tuple(sizes.get(a, 1) for a in mesh.AXES), mesh.AXES)
    rules = mesh.MeshConfig().rules | {'mlp': 'data'}
    arrays = (jnp.zeros((2, 4, 8)), jnp.zeros((2, 4, 2), jnp.int32), None)
    with self.assertRaisesRegex(ds.InputError, "mlp = 'data': shards tokens"):
      exchange.run(None, arrays, (None, None), sharding.Using(grid, rules))


class RaggedTest(absltest.TestCase):
  def test_it_lowers_for_gpu_and_tpu(self):
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    from deepseek_jax.model.experts.moe import apply_experts
    from deepseek_jax.parallel import mesh, sharding

    cfg = mesh.MeshConfig(expert=4)
    shape = tuple(getattr(cfg, a) for a in mesh.AXES)
    grid = AbstractMesh(shape, mesh.AXES)
    how = ExchangeConfig('ragged_all_to_all')
    using = sharding.Using(grid, cfg.rules, how)

    def loss(x, experts, weights, gate_up, down):
      y, _ = exchange.run(
        apply_experts, (x, experts, weights), (gate_up, down), using
      )
      return y.sum()

    cut = NamedSharding(grid, PartitionSpec('expert'))
    shaped = lambda s, d=jnp.float32: jax.ShapeDtypeStruct(s, d, sharding=cut)
    args = (
      shaped((8, 6, 16)),
      shaped((8, 6, 3), jnp.int32),
      shaped((8, 6, 3)),
      shaped((8, 16, 2, 8)),
      shaped((8, 8, 16)),
    )
    traced = jax.jit(jax.grad(loss)).trace(*args)
    for platform in ('cuda', 'tpu'):
      text = traced.lower(lowering_platforms=(platform,)).as_text()
      # Rows and their experts there, rows back; gradients the same ways.
      self.assertGreaterEqual(text.count('@ragged_all_to_all'), 4)


if __name__ == '__main__':
  absltest.main()
