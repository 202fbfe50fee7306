"""The planner against XLA on one device, for many kinds of models.

FLOPs are those of the lowered, unrolled program. There XLA counts elementwise
work too and a loop's body once, so shapes are wide against head and block
sizes, layers are not scanned, and a mesh of one device makes attention take
all heads at once instead of looping over them. Few tokens go to experts by the
dense path, in which every expert sees every token; the grouped path is a loop
of unknown length, which no static count can hold.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AbstractMesh, Mesh

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.model.attention import softmax as attention
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import ComputeConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import sharding
from deepseek_jax.plan import activations, flops, memory
from deepseek_jax.plan import device_shares as mesh
from deepseek_jax.train.muon import MuonConfig
from deepseek_jax.train.optimizer import OptimizerConfig, adamw, update_rule

DIM = 512
MLA = MLAConfig(
  heads=4, q_rank=256, kv_rank=192, nope_dim=128, rope_dim=64, v_dim=128
)
MOE = MoEConfig(experts=8, top_k=4, width=256, shared=1)
MANY = dataclasses.replace(
  MOE, experts=16, top_k=8, shared=2, router=RouterConfig('softmax', bias=False)
)
MHA, GQA, MQA = (GQAConfig(4, n, 128) for n in (4, 2, 1))
DENSE_THEN_MOE = ((('dense',), 1), (('moe',), 2))
PATTERN = ((('dense', 'moe'), 2),)


def config(attention, layout=((('dense',), 2),), moe=MOE, **fields):
  fields.setdefault('compute', ComputeConfig(scan=False))
  return ds.TransformerConfig(
    2048, DIM, layout, attention, FFNConfig(1536), moe, **fields
  )


CONFIGS = {
  'mla': config(MLA),
  'mla_uncompressed': config(dataclasses.replace(MLA, q_rank=None)),
  'mha': config(MHA),
  'gqa': config(GQA),
  'mqa': config(MQA),
  'tied': config(GQA, tied=True),
  'v3_like': config(MLA, DENSE_THEN_MOE, mtp=MTPConfig(1)),
  'v2_like': config(MLA, DENSE_THEN_MOE, MANY),
  'moe16b_like': config(MHA, DENSE_THEN_MOE, MANY),
  'mixed_pattern': config(MLA, PATTERN, mtp=MTPConfig(2)),
  'all_moe': config(GQA, ((('moe',), 2),), mtp=MTPConfig(1), tied=True),
  'bfloat16': config(
    MLA, DENSE_THEN_MOE, compute=ComputeConfig('bfloat16', scan=False)
  ),
}


@functools.cache
def model(name) -> ds.Model:
  return ds.build(CONFIGS[name])


@functools.cache
def shapes(name):
  return jax.eval_shape(model(name).init, jax.random.key(0))


def size(tree) -> int:
  return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


def on_one_device(f, *args):
  """`f` lowered inside a mesh, where no loop runs over heads."""
  grid = Mesh(np.array(jax.devices()[:1]), ('data',))
  with sharding.use(grid, {}):
    return jax.jit(f).lower(*args)


def lowered(name, length, batch=1, **flags):
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  # Cast beforehand: XLA counts a conversion as a FLOP.
  cast = jax.eval_shape(model(name).cast, shapes(name))
  apply = lambda v, t: model(name).apply(v, t, **flags)
  return on_one_device(apply, cast, tokens)


class AuditTest(parameterized.TestCase):
  @parameterized.parameters(*CONFIGS)
  def test_parameters_equal_init(self, name):
    count = plan.count_parameters(CONFIGS[name])
    self.assertEqual(count.total + count.mtp, size(shapes(name)))
    held = mesh.shares(CONFIGS[name], plan.Mesh())
    whole = sum(s.whole for found in held.values() for s in found)
    self.assertEqual(whole, size(shapes(name)))

  @parameterized.parameters(*CONFIGS)
  def test_argument_bytes_equal_the_compiled_programs(self, name):
    cfg = dataclasses.replace(CONFIGS[name], compute=ComputeConfig())
    read = lambda variables, tokens: tokens.sum()
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    kept = jax.jit(read, keep_unused=True)
    compiled = kept.lower(shapes(name), tokens).compile()
    got = compiled.memory_analysis().argument_size_in_bytes
    state = memory.device_bytes(cfg, plan.Mesh())[0]
    self.assertEqual(state['weights'] + tokens.size * 4, got)

  @parameterized.parameters('mla', 'gqa', 'v3_like')
  def test_argument_bytes_of_a_forward_pass(self, name):
    fast = {'xla_backend_optimization_level': 0}
    compiled = lowered(name, 16, mtp=True).compile(compiler_options=fast)
    got = compiled.memory_analysis().argument_size_in_bytes
    weights = memory.device_bytes(CONFIGS[name], plan.Mesh())[0]['weights']
    self.assertEqual(weights + 16 * 4, got)

  @parameterized.parameters(*CONFIGS)
  def test_forward_flops_of_the_lowered_program(self, name):
    cfg = CONFIGS[name]
    # Of experts so few that each row is multiplied by itself: XLA counts no
    # loop's turns.
    length = 2 if 'moe' in str(cfg.layout) else 16
    got = lowered(name, length, mtp=True).cost_analysis()['flops']
    want = plan.count_flops(cfg, length, seen='full', mtp=True)
    # Every MTP depth runs its block; the head is the loss's, not the model's.
    heads = cfg.mtp.depth * want.forward[flops.HEAD]
    want = sum(want.forward.values()) - heads
    self.assertAlmostEqual(got / want, 1, delta=0.03)

  @parameterized.product(
    name=('mla', 'mla_uncompressed', 'mha', 'gqa', 'mqa'), length=(128, 512)
  )
  def test_forward_flops_with_blocks_of_queries(self, name, length):
    got = lowered(name, length, batch=2).cost_analysis()['flops']
    want = plan.count_flops(CONFIGS[name], length, seen='blocks')
    self.assertAlmostEqual(
      got / (2 * sum(want.forward.values())), 1, delta=0.03
    )

  @parameterized.parameters(1, 127, 128, 129, 512, 1000, 1024, 4096, 5000)
  def test_blocks_of_queries_are_the_librarys(self, length):
    want = sum(
      (end - start) * end for start, end in attention._blocks(length, 8)
    )
    self.assertEqual(flops._blocked(length), want)

  @parameterized.product(
    name=('mla', 'gqa'), remat=('none', 'dots', 'full'), length=(256,)
  )
  def test_training_flops_with_what_is_recomputed(self, name, remat, length):
    compute = ComputeConfig(scan=False, remat=remat)
    cfg = dataclasses.replace(CONFIGS[name], compute=compute)
    apply = ds.build(cfg).apply
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    # Squared: the gradient of a plain sum is constant, and XLA drops a matmul.
    loss = lambda v, t: (apply(v, t).logits ** 2).sum()
    low = on_one_device(jax.grad(loss), shapes(name), tokens)
    got = low.cost_analysis()['flops']
    want = plan.count_flops(cfg, length, seen='blocks').executed
    self.assertAlmostEqual(got / want, 1, delta=0.03)

  @parameterized.parameters('mla', 'mla_uncompressed', 'gqa')
  def test_decoding_flops(self, name):
    batch, slots = 1, 512
    cfg = CONFIGS[name]
    empty = jax.eval_shape(lambda: model(name).init_cache(batch, slots))
    cache = dataclasses.replace(empty, fresh=False)
    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    step = lambda v, t, c: model(name).apply(v, t, cache=c)
    low = on_one_device(step, shapes(name), token, cache)
    want = plan.decode_flops(cfg, slots)
    want = want.get('absorbed') or want['cached']
    self.assertAlmostEqual(low.cost_analysis()['flops'] / want, 1, delta=0.03)

  @parameterized.parameters(*CONFIGS)
  def test_attention_weights_are_those_of_the_model(self, name):
    cfg = CONFIGS[name]
    held = mesh.shares(cfg, plan.Mesh())[('block', 0)]
    matrices = sum(
      s.whole for s in held if '.attention.' in s.name and s.matrix
    )
    cost = plan.attention_cost(cfg.attention, cfg.dim)
    self.assertEqual(cost.weights, matrices)

  @parameterized.parameters('float32', 'bfloat16')
  def test_checkpoint_bytes_equal_the_train_states(self, moments):
    cfg = OptimizerConfig(moments=moments)
    variables = shapes('v3_like')
    optimizer = adamw(cfg, model('v3_like').abstract['params'])
    state = jax.eval_shape(optimizer.init, variables['params'])
    leaves = jax.tree.leaves((variables, state))
    total = sum(a.size * a.dtype.itemsize for a in leaves if a.ndim)
    got = plan.checkpoint_bytes(CONFIGS['v3_like'], cfg)
    self.assertEqual(got, total)


def moments_of(state, where=None) -> int:
  """Bytes of an optimizer's abstract state, or of its shards, scalars aside."""
  shape = lambda a, s: a.shape if s is None else s.shard_shape(a.shape)
  leaves = jax.tree.leaves(state)
  places = [None] * len(leaves) if where is None else jax.tree.leaves(where)
  return sum(
    math.prod(shape(a, s)) * a.dtype.itemsize
    for a, s in zip(leaves, places, strict=True)
    if a.ndim
  )


class MuonTest(parameterized.TestCase):
  """Muon has one moment of a matrix, AdamW two of the rest."""

  @parameterized.product(
    config=('v4_tiny', 'v3_tiny', 'engram_tiny', 'nsa_tiny'),
    moments=('float32', 'bfloat16'),
  )
  def test_bytes_equal_those_of_the_real_state(self, config, moments):
    config = getattr(ds.presets, config)()
    cfg = OptimizerConfig(moments=moments, muon=MuonConfig())
    built = ds.build(config)
    variables = jax.eval_shape(built.init, jax.random.key(0))
    rule = update_rule(cfg, built.abstract['params'])
    state = moments_of(jax.eval_shape(rule.init, variables['params']))
    training = memory.Training(optimizer=cfg)
    got = memory.device_bytes(config, plan.Mesh(), training)[0]['moments']
    self.assertEqual(got, state)
    two = memory.Training(optimizer=OptimizerConfig(moments=moments))
    both = memory.device_bytes(config, plan.Mesh(), two)[0]['moments']
    self.assertBetween(got / both, 0.5, 0.8)
    whole = state + sum(4 * a.size for a in jax.tree.leaves(variables))
    # Scalar buffers are saved, too, and planned for.
    self.assertEqual(plan.checkpoint_bytes(config, cfg), whole)

  @parameterized.parameters(
    {'fsdp': 2, 'expert': 2}, {'fsdp': 4, 'tensor': 2, 'data': 2}
  )
  def test_bytes_on_a_device_equal_jaxs_shards(self, **sizes):
    name, grid = 'v3_like', plan.mesh_of(sizes)
    cfg = OptimizerConfig(muon=MuonConfig())
    shape = tuple(getattr(grid, a) for a in mesh.AXES)
    devices = AbstractMesh(shape, mesh.AXES)
    abstract = model(name).abstract
    rule = update_rule(cfg, abstract['params'])
    state = jax.eval_shape(rule.init, shapes(name)['params'])
    where = meshes.shardings(devices, plan.RULES, abstract, state)
    training = memory.Training(optimizer=cfg)
    for zero in (0, 1):
      training = dataclasses.replace(training, zero=zero)
      got = memory.device_bytes(CONFIGS[name], grid, training)[0]['moments']
      want = moments_of(state, where)
      if zero:
        self.assertLess(got, want)
      else:
        self.assertEqual(got, want)

  def test_the_update_reads_fewer_bytes_and_the_report_says_why(self):
    config = ds.presets.v4_tiny()
    adamw, muon = (
      plan.estimate(
        config,
        recipe=plan.Recipe(
          batch=8, training=memory.Training(256, optimizer=optimizer)
        ),
      )
      for optimizer in (OptimizerConfig(), OptimizerConfig(muon=MuonConfig()))
    )
    self.assertLess(muon.time.update, adamw.time.update)
    self.assertLess(muon.checkpoint.bytes, adamw.checkpoint.bytes)
    self.assertIn("one for each of Muon's", ' '.join(muon.assumptions))
    self.assertNotIn('Muon', ' '.join(adamw.assumptions))


class ShardsTest(parameterized.TestCase):
  @parameterized.product(
    name=('v3_like', 'moe16b_like', 'mixed_pattern', 'mqa'),
    sizes=(
      {'fsdp': 2},
      {'expert': 4, 'data': 2},
      {'fsdp': 4, 'expert': 2, 'tensor': 2},
    ),
  )
  def test_bytes_per_device_equal_jaxs_shards(self, name, sizes):
    if name == 'mqa' and 'tensor' in sizes:
      self.skipTest('one key head is not split')
    grid = plan.mesh_of(sizes)
    abstract = AbstractMesh(
      tuple(getattr(grid, a) for a in mesh.AXES), mesh.AXES
    )
    want = 0
    state = model(name).abstract
    named = sharding.shardings(state['params'], abstract, plan.RULES)
    for leaf, where in zip(
      jax.tree.leaves(state['params']), jax.tree.leaves(named)
    ):
      want += 4 * math.prod(where.shard_shape(leaf.shape))
    cfg = dataclasses.replace(CONFIGS[name], compute=ComputeConfig())
    got = memory.device_bytes(cfg, grid)[0]
    self.assertEqual(got['gradients'], want)
    buffers = sum(4 * a.size for a in jax.tree.leaves(state['buffers']))
    self.assertEqual(got['weights'], want + buffers)
    self.assertEqual(got['moments'], 2 * want)

  def test_an_axis_that_does_not_divide_is_named(self):
    with self.assertRaisesRegex(ds.InputError, r'kv_heads.*mesh.tensor = 2'):
      mesh.shares(CONFIGS['mqa'], plan.Mesh(tensor=2))


class ActivationsTest(parameterized.TestCase):
  def test_a_dense_block_keeps_what_its_equations_need(self):
    """Counted by hand for MLA, all in bfloat16, under the matmul policy."""
    D, T, F, a = DIM, 256, 1536, MLA
    block = CONFIGS['mla'].block('dense')
    kept = activations.block_activations(block, D, T, 'bfloat16')
    H = a.heads
    # Block input; both query matmuls; latent and rotary key; expanded keys
    # and values; attention output (the FFN norm's input); gate and up.
    numbers = D + a.q_rank + H * (a.nope_dim + a.rope_dim)
    numbers += a.kv_rank + a.rope_dim + H * (a.nope_dim + a.v_dim) + D + 2 * F
    self.assertEqual(kept.dots, 2 * T * numbers)
    self.assertEqual(kept.full, 2 * T * D)
    self.assertGreater(kept.none, kept.dots)

  def test_a_device_of_a_tensor_axis_keeps_its_heads_and_hidden_numbers(self):
    D, T, F, a = DIM, 256, 1536, MLA
    kept = activations.kept_bytes(
      ds.changed(CONFIGS['mla'], {'compute.dtype': 'bfloat16'}),
      CONFIGS['mla'].block('dense'),
      T,
      tensor=2,
    )
    whole = D + a.q_rank + a.kv_rank + a.rope_dim + D
    cut = a.heads * (a.nope_dim + a.rope_dim + a.nope_dim + a.v_dim) + 2 * F
    self.assertEqual(kept.dots, 2 * T * (whole + cut // 2))
    self.assertEqual(kept.full, 2 * T * D)

  @parameterized.parameters('mla', 'gqa', 'v2_like')
  def test_layers_add_up_to_the_models_residuals(self, name):
    """Two layers more in the model keep twice what a block keeps."""
    cfg, T = CONFIGS[name], 64
    kind = 'moe' if name == 'v2_like' else 'dense'

    def residuals(layers):
      made = ds.build(dataclasses.replace(cfg, layout=(((kind,), 1),) * layers))
      variables = jax.eval_shape(made.init, jax.random.key(0))
      f = lambda v, t: made.apply(v, t).hidden.sum()
      tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
      saved = lambda v, t: jax.tree.leaves(jax.vjp(lambda v: f(v, t), v)[1])
      jaxpr = jax.make_jaxpr(saved)(variables, tokens).jaxpr
      depends = activations._depends(jaxpr, len(jax.tree.leaves(variables)))
      found = {v: v.aval for v, hit in zip(jaxpr.outvars, depends) if hit}
      return sum(a.size * a.dtype.itemsize for a in found.values())

    kept = activations.kept_bytes(cfg, cfg.block(kind), T)
    self.assertEqual(residuals(3) - residuals(1), 2 * kept.none)


if __name__ == '__main__':
  absltest.main()
