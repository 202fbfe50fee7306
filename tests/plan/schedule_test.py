"""Reads what runs beside compute from the order of a scheduled program."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from deepseek_jax.parallel import wires
from deepseek_jax.plan.schedule import Rates, exposed_share, schedule

# A product takes 2 s, a transfer 3 s; 1e-6 of that to read an array.
RATES = Rates(flops=1e9, memory=2e12, link=5e5)
_ARRAY = 'bf16[1000,1000]{1,0}'
_HEAD = 'HloModule jit_f, is_scheduled=true\n'
_GEMM = f"""
%gemm (p: bf16[1000,1000], q: bf16[1000,1000]) -> bf16[1000,1000] {{
  %p = {_ARRAY} parameter(0)
  %q = {_ARRAY} parameter(1)
  ROOT %d = {_ARRAY} dot(%p, %q), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}
}}
"""
_X = f'  %x = {_ARRAY} parameter(0)\n'


def begun(name, scope, group='0,1,2,3'):
  return (
    f'  %{name} = (({_ARRAY}), {_ARRAY}) all-to-all-start(%x), replica_groups='
    f'{{{{{group}}}}},'
    f' metadata={{op_name="jit(f)/jvp()/ffn/{scope}/all_to_all"}}\n'
  )


def ended(name):
  return f'  %{name}.e = {_ARRAY} all-to-all-done(%{name})\n'


def product(name):
  return f'  %{name} = {_ARRAY} fusion(%x, %x), kind=kCustom, calls=%gemm\n'


def at_once(scope):
  return (
    f'  %now = {_ARRAY} all-to-all(%x), replica_groups={{{{0,1,2,3}}}},'
    f' metadata={{op_name="jit(f)/{scope}/all_to_all"}}\n'
  )


def entry(*lines, more=''):
  text = (
    _HEAD + _GEMM + more + '\nENTRY %main (x: bf16[1000,1000]) -> f32[] {\n'
  )
  return text + ''.join((_X, *lines)) + '}\n'


def read(*lines, **how):
  return schedule(entry(*lines, **how), 4, RATES)


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), 3.0),
    (('a',), 1.0),
    (('a', 'b'), 0.0),  # 4 s of compute hide 3 s
  )
  def test_what_stands_between_begin_and_end_hides(self, products, want):
    lines = map(product, products)
    [got] = read(begun('s', 'dispatch'), *lines, ended('s'))
    self.assertTrue(got.asynchronous)
    self.assertEqual(got.scope, 'dispatch')
    self.assertAlmostEqual(got.wire, 3.0)
    self.assertAlmostEqual(got.exposed, want, places=4)
    self.assertAlmostEqual(exposed_share([got]), want / 3, places=4)

  def test_a_synchronous_one_is_exposed_wherever_it_stands(self):
    [got] = read(product('a'), at_once('combine'), product('b'))
    self.assertFalse(got.asynchronous)
    self.assertEqual((got.scope, got.exposed), ('combine', got.wire))

  def test_two_at_a_time_share_the_link(self):
    # 6 s of transfers beside 2 s of compute: 4 s are waited for.
    first, second = read(
      begun('s', 'dispatch'),
      begun('t', 'combine_gradient'),
      product('a'),
      ended('s'),
      ended('t'),
    )
    self.assertEqual(second.scope, 'combine_gradient')
    self.assertAlmostEqual(first.exposed, 1.0, places=4)
    self.assertAlmostEqual(second.exposed, 3.0, places=4)

  def test_a_loop_counts_every_pass_and_a_branch_none(self):
    body = '\n%body (x: bf16[1000,1000]) -> bf16[1000,1000] {\n' + ''.join(
      (_X, begun('s', 'dispatch'), product('a'), ended('s'))
    )
    branch = '\n%other (x: bf16[1000,1000]) -> bf16[1000,1000] {\n'
    got = read(
      f'  %w = {_ARRAY} while(%x), condition=%c, body=%body,'
      ' backend_config={"known_trip_count":{"n":"5"}}\n',
      f'  %b = {_ARRAY} conditional(%x, %x, %x), branch_computations='
      '{%other, %other}\n',
      more=body + '}\n' + branch + _X + at_once('combine') + '}\n',
    )
    self.assertLen(got, 1)
    self.assertEqual(got[0].collective.times, 5)
    self.assertAlmostEqual(got[0].wire, 15.0)
    self.assertAlmostEqual(got[0].exposed, 5.0, places=4)

  def test_a_group_of_one_sends_nothing(self):
    lines = begun('s', 'dispatch', group='0'), ended('s')
    self.assertEmpty(read(*lines))
    self.assertEqual(exposed_share(read(*lines)), 0)

  def test_a_program_without_an_order_is_refused(self):
    text = entry().replace(', is_scheduled=true', '')
    with self.assertRaisesRegex(ValueError, 'is not scheduled'):
      schedule(text, 4, RATES)


class ScopeTest(absltest.TestCase):
  def test_transfers_of_experts_are_named_forward_and_backward(self):
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((2,), ('e',), axis_types=kinds)
    wire = wires.Wire('e', 2, None, 'bfloat16', 'bfloat16', 'float32')
    rows = PartitionSpec('e')

    def there_and_back(x):
      y = wires.there(x, (), wire)
      return wires.back(jnp.sin(y), (), wire)

    f = jax.shard_map(there_and_back, mesh=mesh, in_specs=rows, out_specs=rows)
    place = jax.sharding.NamedSharding(mesh, rows)
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=place)
    with jax.sharding.use_abstract_mesh(mesh):
      traced = jax.jit(jax.value_and_grad(lambda x: f(x).sum())).trace(x)
      lowered = traced.lower(lowering_platforms=('cpu',))
    text = lowered.as_text(debug_info=True)
    for scope in ('dispatch', 'combine'):
      for name in (scope, f'{scope}_gradient'):
        self.assertRegex(text, rf'\b{name}/all_to_all')


if __name__ == '__main__':
  absltest.main()
