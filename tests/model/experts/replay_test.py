"""Routes that a sampler's routers chose, replayed in training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.rl import grpo
from deepseek_jax.train.objective import total_weight
from deepseek_jax.train.step import loss_and_metrics
from tests import tiny
from tests.rl import rollouts

T = 10


def config(**compute):
  """Two segments: a pattern with a dense block that repeats, and one layer."""
  made = tiny.config('mixed')
  return dataclasses.replace(
    made,
    layout=((('dense', 'moe'), 2), (('moe',), 1)),
    attention=tiny.ATTENTIONS['gqa'],
    mtp=dataclasses.replace(made.mtp, depth=0),
    compute=ds.changed(made.compute, compute),
  )


@functools.cache
def built(**compute):
  return ds.build(config(**compute))


@functools.cache
def variables():
  return tiny.draw(built())


@functools.cache
def applied(**compute):
  return jax.jit(built(**compute).apply)


def live_routes(out):
  """[B T L K]: the experts that the routers of an Output chose."""
  return np.asarray(ds.moe_statistics(out.aux, 'experts')).transpose(1, 2, 0, 3)


def other_routes(seed=0):
  """[2 T 3 3]: distinct experts of eight, drawn for every token and layer."""
  rng = np.random.default_rng(seed)
  return rng.random((2, T, 3, 8)).argsort(-1)[..., :3].astype(np.int32)


class ReplayTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tokens = tiny.tokens(2, T)

  def test_its_own_choice_changes_no_bit(self):
    want = applied()(variables(), self.tokens)
    routes = live_routes(want)
    got = applied()(variables(), self.tokens, routes=routes)
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_array_equal(live_routes(got), routes)

  def test_another_choice_is_used_in_its_own_layer(self):
    routes = other_routes()
    got = applied()(variables(), self.tokens, routes=routes)
    np.testing.assert_array_equal(live_routes(got), routes)
    load = np.asarray(ds.moe_statistics(got.aux, 'load'))
    for layer in range(3):
      want = np.bincount(routes[:, :, layer].ravel(), minlength=8)
      np.testing.assert_array_equal(load[layer], want)

  def test_a_token_without_routes_is_routed_as_ever(self):
    routes = other_routes()
    routes[0, 4, 1] = -1
    routes[1] = -1
    got = applied()(variables(), self.tokens, routes=routes)
    free = applied()(variables(), self.tokens)
    # Groups of other sizes round otherwise.
    np.testing.assert_allclose(got.logits[1], free.logits[1], atol=1e-5)
    chosen = live_routes(got)
    self.assertTrue((chosen >= 0).all())
    routes[0, 4, 1] = chosen[0, 4, 1]
    np.testing.assert_array_equal(chosen[0], routes[0])

  @pytest.mark.slow
  def test_the_router_learns_from_live_scores(self):
    routes = jnp.asarray(other_routes())

    def loss(params, compute=()):
      apply = built(**dict(compute)).apply
      held = {**variables(), 'params': params}
      out = apply(held, self.tokens, routes=routes)
      return (out.logits[..., 3] ** 2).mean()

    params = variables()['params']
    gradient = jax.jit(jax.grad(loss))(params)
    # Finite differences: with routes fixed the loss is smooth.
    place = lambda p: p['segments'][0][1]['ffn']['router']['weight']
    got = place(gradient)
    self.assertGreater(np.abs(got).max(), 0)
    rng = np.random.default_rng(0)
    step = rng.normal(size=got.shape).astype(np.float32)
    run = jax.jit(loss)

    def at(size):
      moved = jax.tree.map(lambda a: a, params)
      router = moved['segments'][0][1]['ffn']['router']
      router['weight'] = router['weight'] + size * step
      return float(run(moved))

    want = (at(1e-2) - at(-1e-2)) / 2e-2
    np.testing.assert_allclose((got * step).sum(), want, rtol=2e-2)
    # Recomputed and unrolled layers replay them, too.
    for compute in ({'remat': 'full'}, {'scan': False}):
      again = jax.jit(functools.partial(loss, compute=tuple(compute.items())))
      found = jax.grad(again)(params)
      for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

  @parameterized.parameters(
    (lambda r: r[:, :, :2], r'int32\[2, 10, 2, 3\]; must be integers'),
    (lambda r: r.astype(np.float32), 'must be integers'),
    (lambda r: np.where(r == r.max(), 8, r), '8 at .* outside the experts'),
    (lambda r: np.zeros_like(r), 'has an expert twice'),
  )
  def test_what_no_router_could_have_chosen_is_refused(self, change, message):
    with self.assertRaisesRegex(ds.InputError, f'routes: .*{message}'):
      built().apply(variables(), self.tokens, routes=change(other_routes()))


class ObjectiveTest(absltest.TestCase):
  def test_the_step_reads_them_where_the_token_is_read(self):
    model = built()
    batch = rollouts.batch(model, variables(), 2, T + 1)
    batch['routes'] = np.concatenate(
      [other_routes(), np.full((2, 1, 3, 3), -1, np.int32)], axis=1
    )
    objective = grpo.GRPOConfig(keep_routing=True).build(model)

    def run(held, batch):
      inputs = objective.inputs(batch)
      shares = ds.Shares(total_weight(inputs), 1, jnp.float32(0))
      return loss_and_metrics(model, held, batch, shares, objective)[1]

    got = jax.jit(run)(variables(), batch)
    real = batch['segments'][:, :-1] > 0
    for layer in range(3):
      chosen = batch['routes'][:, :-1, layer][real]
      want = np.bincount(chosen.ravel(), minlength=8)
      np.testing.assert_array_equal(got['load'][layer], want)
    del batch['routes']
    with self.assertRaisesRegex(ds.InputError, "batch has no 'routes'"):
      run(variables(), batch)


if __name__ == '__main__':
  absltest.main()
