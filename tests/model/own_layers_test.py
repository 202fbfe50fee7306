"""A user's own attention and router compute what they say, in a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.hf import names
from deepseek_jax.infer import redundant_experts
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import (
  RouterConfig,
  choose,
  routing,
  score,
)
from deepseek_jax.plan.attention import attention_cost
from deepseek_jax.train import update
from tests.cli import own_window


@dataclasses.dataclass(frozen=True)
class CopyConfig:
  """The library's sigmoid router, written as a user would."""

  def check(self, experts, top_k):
    if experts < 2:
      raise ds.InputError('router: needs two experts')

  def build(self, dim, *, experts, top_k, std, rngs):
    return Copy(self, dim, experts, top_k, std=std, rngs=rngs)


class Copy(own_window.Square):
  def __call__(self, x, ctx):
    weight = self.weight[...]
    logits = jnp.einsum('BTD,DE->BTE', x, weight, precision='highest')
    scores = jax.nn.sigmoid(logits)
    chosen = choose(scores, self.bias[...], self.top_k, RouterConfig())
    return routing(*chosen, scores, ctx.valid)


def _moe(router) -> tuple:
  cfg = MoEConfig(experts=4, top_k=2, width=8, router=router)
  return nnx.split(cfg.build(16, std=0.5, rngs=nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class CountedConfig(own_window.WindowConfig):
  """The window of the example, which knows how often it is traced."""

  alike: bool = True

  def build(self, dim, *, std, rngs):
    made = Counted(self, dim, std=std, rngs=rngs)
    made.about = None if self.alike else Setting(np.ones(2))
    return made


@dataclasses.dataclass
class Setting:
  """Holds what neither has a hash nor can be compared."""

  numbers: np.ndarray


class Counted(own_window.Window):
  calls = 0

  def __call__(self, x, ctx, past=None):
    Counted.calls += 1
    return super().__call__(x, ctx, past)


class TracedOnceTest(parameterized.TestCase):
  def traced(self, layout, **fields):
    """Traces the loss and gradient of a model; Counted.calls has how often."""
    base = own_window.get_config().model
    base = dataclasses.replace(
      base,
      attention=CountedConfig(4, 2, 16, **fields),
      layout=layout,
      compute=dataclasses.replace(base.compute, scan=False),
    )
    model = ds.build(base)
    variables = jax.jit(model.init)(jax.random.key(0))
    self.made = model, variables
    tokens = jnp.arange(12).reshape(2, 6)

    def loss(params):
      out = model.apply({**variables, 'params': params}, tokens, train=True)
      return (out.logits**2).sum()

    Counted.calls = 0
    return jax.jit(jax.value_and_grad(loss)).trace(variables['params'])

  def test_blocks_that_are_alike_are_traced_once(self):
    layout = ((('dense', 'moe', 'moe'), 1),)
    once = self.traced(layout)
    self.assertEqual(Counted.calls, 2)
    each = self.traced(layout, alike=False)
    self.assertEqual(Counted.calls, 3)
    params = self.made[1]['params']
    made, plain = (step.lower().compile()(params) for step in (once, each))
    jax.tree.map(np.testing.assert_array_equal, made, plain)

  def test_outside_of_a_trace_layers_see_numbers(self):
    self.traced(((('dense', 'moe'), 1),))
    model, variables = self.made
    Counted.calls = 0
    model.apply(variables, jnp.arange(12).reshape(2, 6))
    self.assertEqual(Counted.calls, 2)

  def test_so_are_repeats_of_a_pattern_that_is_unrolled(self):
    self.traced(((('dense', 'moe'), 3),))
    self.assertEqual(Counted.calls, 2)


class RouterTest(parameterized.TestCase):
  def test_a_copy_of_ours_has_our_outputs_and_gradients(self):
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    segments = jnp.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
    tokens = jnp.ones((2, 6), jnp.int32)
    ctx = Context(tokens, tokens, segments, train=True)
    results = []
    for router in (RouterConfig(), CopyConfig()):
      graph, state = _moe(router)

      def loss(state, graph=graph):
        y, stats = nnx.merge(graph, state)(x, ctx)
        return (y**2).sum(), stats

      grads, stats = jax.grad(loss, has_aux=True, allow_int=True)(state)
      grads = nnx.to_pure_dict(grads)
      results.append((stats, grads['router']['weight'], grads['down']))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      *results,
    )
    self.assertEqual(int(results[1][0]['load'].sum()), 2 * 10)

  def test_its_bias_is_moved_by_the_load(self):
    model = ds.build(own_window.get_config().model)
    buffers = model.init(jax.random.key(0))['buffers']
    loads = {'segments/0/1': jnp.array([[9, 1, 5, 5]])}
    moved = update.move_biases(buffers, loads, 0.5)
    bias = moved['segments'][0][1]['ffn']['router']['bias']
    np.testing.assert_array_equal(bias, [[-0.5, 0.5, 0, 0]])

  def test_padding_goes_nowhere_and_counts_nothing(self):
    experts = jnp.array([[[0, 1], [2, 3]]])
    scores, valid = jnp.ones((1, 2, 4)), jnp.array([[True, False]])
    made = routing(experts, jnp.ones((1, 2, 2)), scores, valid, jnp.arange(4))
    np.testing.assert_array_equal(made.experts, [[[0, 1], [4, 4]]])
    np.testing.assert_array_equal(made.weights, [[[1, 1], [0, 0]]])
    np.testing.assert_array_equal(made.load, [1, 1, 0, 0])

  def test_its_own_check_is_asked(self):
    with self.assertRaisesRegex(ds.InputError, 'needs two experts'):
      MoEConfig(experts=1, top_k=1, width=8, router=CopyConfig())

  def test_no_router_is_refused_by_name(self):
    changes = {'moe.router': own_window.WindowConfig(2, 1, 8)}
    with self.assertRaisesRegex(ds.InputError, 'WindowConfig, must be Router'):
      ds.changed(own_window.get_config().model, changes)

  def test_an_unknown_scoring_of_a_subclass_is_no_sigmoid(self):
    with self.assertRaisesRegex(ds.InputError, "router.scoring = 'relu'"):
      score(jnp.ones(4), 'relu')

  def test_redundant_experts_take_it(self):
    model = ds.build(own_window.get_config().model)
    variables = model.init(jax.random.key(0))
    made, _ = redundant_experts.with_copies(
      model.config, variables, np.ones((1, 4)), 2, nodes=1, devices=2
    )
    self.assertEqual(made.moe.redundant, 2)
    self.assertEqual(made.moe.router, own_window.SquareConfig())


class OutsideTest(absltest.TestCase):
  """Checks what other parts of the library make of an extended class."""

  def setUp(self):
    super().setUp()
    dense = {'layout': ((('dense',), 2),), 'moe': None}
    self.config = ds.changed(own_window.get_config().model, dense)

  def test_is_exported_to_no_family(self):
    words = 'attention = tests.cli.own_window:WindowConfig: no Hugging Face'
    with self.assertRaisesRegex(ds.InputError, words):
      names.leaves(self.config)

  def test_a_plan_says_what_it_takes_it_for(self):
    made = ds.plan.estimate(self.config)
    words = [line for line in made.assumptions if 'WindowConfig' in line]
    self.assertLen(words, 1)

  def test_its_own_cost_counts(self):
    costly = dataclasses.make_dataclass(
      'Costly',
      [],
      bases=(own_window.WindowConfig,),
      frozen=True,
      namespace={'cost': lambda self, dim: ('its own', dim)},
    )
    cost = attention_cost(costly(2, 1, 8), 16)
    self.assertEqual(cost, ('its own', 16))


class WindowTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    config = own_window.get_config().model
    self.model = ds.build(ds.changed(config, {'init_std': 0.3}))
    self.variables = self.model.init(jax.random.key(0))
    self.tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 261)

  def test_a_token_out_of_all_windows_changes_nothing(self):
    logits = self.model.apply(self.variables, self.tokens).logits
    other = self.tokens.at[0, 0].add(1)
    changed = self.model.apply(self.variables, other).logits
    same = np.isclose(changed, logits, atol=1e-6).all(axis=(0, 2))
    # Two layers reach 2 * (window - 1) = 6 tokens back.
    np.testing.assert_array_equal(same, [False] * 7 + [True] * 5)

  def test_decoding_equals_the_forward_pass(self):
    logits = self.model.apply(self.variables, self.tokens).logits
    cache = self.model.init_cache(1, 12)
    out = self.model.apply(self.variables, self.tokens[:, :7], cache=cache)
    parts = [out.logits]
    for t in range(7, 12):
      out = self.model.apply(
        self.variables, self.tokens[:, t : t + 1], cache=out.cache
      )
      parts.append(out.logits)
    np.testing.assert_allclose(
      jnp.concatenate(parts, axis=1), logits, rtol=1e-4, atol=1e-4
    )


if __name__ == '__main__':
  absltest.main()
