"""A model's numbers don't depend on which code computes them."""

import contextlib
import dataclasses
import functools
import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.errors import InputError
from deepseek_jax.model import kernels
from deepseek_jax.model.attention import dsa
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.latent_reading import Latent
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.paged_latent import PagedLatent
from deepseek_jax.model.attention.sparse_latent import PagedSparseLatent
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import ComputeConfig
from pallas_kernels import compat, dispatch, target, tpu_calls
from tests import tiny

OPS = ('mla_prefill', 'router', 'grouped_swiglu')
# One layer with every idea that has a kernel.
CONFIG = dataclasses.replace(
  tiny.config('v3'), layout=((('moe',), 1),), mtp=MTPConfig(0)
)


def with_kernels(impl: str | None) -> ds.Model:
  compute = dataclasses.replace(CONFIG.compute, kernels=impl)
  return ds.build(dataclasses.replace(CONFIG, compute=compute))


@contextlib.contextmanager
def counted():
  """Collects the operations that run, with their impl."""
  seen, run = [], dispatch.run

  def spy(op, impl, *args, **more):
    seen.append((op, dispatch.chosen(impl)))
    return run(op, impl, *args, **more)

  with mock.patch.object(dispatch, 'run', spy):
    yield seen


class KernelsTest(parameterized.TestCase):
  def test_logits_and_gradients_are_those_of_the_layers_own_code(self):
    variables, tokens = tiny.draw(ds.build(CONFIG)), tiny.tokens(2, 20)
    results, seen = {}, {}
    for impl in (None, 'reference'):
      model = with_kernels(impl)

      def loss(params, model=model):
        out = model.apply({**variables, 'params': params}, tokens)
        return (out.logits * jnp.cos(out.logits)).mean(), out.logits

      with counted() as seen[impl]:
        results[impl] = jax.jit(jax.value_and_grad(loss, has_aux=True))(
          variables['params']
        )
    (_, own), own_grads = results[None]
    (_, other), grads = results['reference']
    self.assertLess(tiny.relative(other, own), 1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(own_grads)):
      self.assertLess(tiny.relative(a, b), 1e-4)
    for op in OPS:
      self.assertIn((op, 'reference'), seen['reference'])
      self.assertIn((op, None), seen[None])
    # Backward passes too, which are traced when apply has returned.
    self.assertEqual({impl for _, impl in seen['reference']}, {'reference'})

  def test_decoding_gives_the_logits_of_the_layers_own_code(self):
    variables, tokens = tiny.draw(ds.build(CONFIG)), tiny.tokens(2, 11)
    logits = {}
    for impl in (None, 'reference'):
      model = with_kernels(impl)
      step = jax.jit(
        lambda t, c, model=model: model.apply(variables, t, cache=c)
      )
      with counted() as seen:
        out = step(tokens[:, :10], model.init_cache(2, 16))
        steps = [out.logits[:, -1]]
        steps.append(step(tokens[:, 10:], out.cache).logits[:, -1])
      self.assertIn(('mla_decode', impl), seen)
      self.assertIn(('latent_kv', impl), seen)
      logits[impl] = np.stack(steps)
    self.assertLess(tiny.relative(logits['reference'], logits[None]), 1e-5)

  @parameterized.parameters(
    (None, ['indexer', 'sparse_mla']),
    # Its own code is one operation, the kernels are two.
    (IndexBlocksConfig(2, 3), ['index_candidates', 'sparse_mla']),
  )
  def test_sparse_attention_reads_and_gives_the_same(self, blocks, ops):
    attention = DSAConfig(
      *(2, 12, 16, 8, 4, 6),
      indexer=IndexerConfig(2, 8, blocks=blocks),
      top_k=5,
    )
    layer = attention.build(16, std=0.3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 14, 16)), jnp.float32)
    segments = jnp.repeat(jnp.asarray([[1, 2], [3, 3]]), 7, axis=1)
    at = jnp.broadcast_to(jnp.arange(14), (2, 14))
    ctx = Context(jnp.zeros((2, 14), jnp.int32), at, segments)
    results = {}
    for impl in (None, 'reference'):
      with kernels.using(impl), counted() as seen:
        results[impl] = jax.jit(lambda x: layer(x, ctx)[0])(x)
      by_kernels = ['indexer'] if blocks and impl else []
      self.assertEqual([op for op, _ in seen], by_kernels + ops)
    self.assertLess(tiny.relative(results['reference'], results[None]), 1e-5)

  @pytest.mark.slow
  @absltest.skipIf(
    jax.__version_info__ < (0, 11),
    'the interpreter of jax 0.10 cannot load with a layout; use 0.11 or later',
  )
  def test_logits_by_kernels_in_the_interpreter(self):
    config = ds.TransformerConfig(
      vocab_size=32,
      dim=256,
      layout=((('moe',), 1),),
      attention=MLAConfig(2, None, 512, 128, 64, 128),
      moe=MoEConfig(8, 2, 128, router=RouterConfig(groups=2, top_groups=1)),
      compute=ComputeConfig(dtype='bfloat16'),
      init_std=0.05,
    )
    model = ds.build(config)
    variables = model.init(jax.random.key(0))
    tokens = tiny.tokens(1, 20) % 32

    def run(impl):
      compute = dataclasses.replace(config.compute, kernels=impl)
      model = ds.build(dataclasses.replace(config, compute=compute))
      cache = model.init_cache(1, 64)
      out = model.apply(variables, tokens[:, :19], cache=cache)
      last = model.apply(variables, tokens[:, 19:], cache=out.cache)
      return np.concatenate([out.logits, last.logits], axis=1)

    with compat.interpreted(), counted() as seen:
      got = run('gpu')
    for op in (*OPS, 'mla_decode', 'latent_kv'):
      self.assertIn((op, 'gpu'), seen)
    # Both round every layer's result to bfloat16, at different places.
    self.assertLess(tiny.relative(got, run(None)), 2e-2)

  @pytest.mark.slow
  @absltest.skipIf(
    jax.__version_info__ < (0, 11),
    'the interpreter of jax 0.10 cannot load with a layout; use 0.11 or later',
  )
  def test_choices_in_pages_by_the_kernel_in_the_interpreter(self):
    cfg = DSAConfig(16, None, 512, 128, 64, 128, top_k=70)
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(0.3 * rng.normal(size=s), jnp.bfloat16)
    q, ups = (draw(2, 2, 16, 128), draw(2, 2, 16, 64)), draw(2, 512, 16, 128)
    pages = Latent(draw(5, 64, 512), draw(5, 64, 64))
    held = PagedLatent(pages, jnp.asarray([[3, 1], [2, 4]]))
    chosen = rng.permuted(np.tile(np.arange(128), (2, 2, 1)), axis=-1)
    chosen = jnp.asarray(np.sort(chosen[..., :70]), jnp.int32)
    chosen = chosen.at[0, 1, 50:].set(-1)
    valid = jnp.asarray([[True, True], [True, False]])
    past = PagedSparseLatent(held, draw(2, 128, 128))
    keys, at = past.one_row(chosen, valid)
    alone = tuple(a.reshape(1, 4, *a.shape[2:]) for a in q)
    read = functools.partial(dsa.read, cfg, shares=False)
    rows = held.gathered(jnp.asarray([128, 128]))
    want = jnp.where(valid[..., None, None], read(q, rows, ups, chosen).y, 0)
    with compat.interpreted(), kernels.using('gpu'):
      got = read(alone, keys, ups, at).y.reshape(want.shape)
    self.assertLess(tiny.relative(got, want), 2e-2)
    np.testing.assert_array_equal(got[1, 1], 0)

  def test_decoding_by_the_kernel_for_tpus_in_the_interpreter(self):
    variables, tokens = tiny.draw(ds.build(CONFIG)), tiny.tokens(2, 11)
    logits = {}
    for impl in (None, 'tpu'):
      model = with_kernels(impl)
      step = jax.jit(
        lambda t, c, model=model: model.apply(variables, t, cache=c)
      )
      with tpu_calls.interpreted(), dispatch.recorded() as found:
        out = step(tokens[:, :10], model.init_cache(2, 16))
        steps = [out.logits[:, -1]]
        steps.append(step(tokens[:, 10:], out.cache).logits[:, -1])
        logits[impl] = np.stack(steps)
    self.assertIn(('mla_decode', 'tpu'), [(c.op, c.impl) for c in found])
    self.assertLess(tiny.relative(logits['tpu'], logits[None]), 1e-5)

  def test_what_a_kernel_cannot_take_goes_to_the_own_code_with_its_shapes(self):
    dispatch.say_once.cache_clear()

    def odd(impl, x):
      raise NotImplementedError('odd')

    def pick(kernel):
      own = lambda: 'own'
      return kernels.pick('op', kernel, own, (np.zeros((2, 3)),), ((),), ())

    with target.targeting('cuda', '9.0'):
      self.assertEqual(pick(lambda impl, x: impl), 'gpu')
      with self.assertLogs('pallas_kernels', logging.WARNING) as logs:
        self.assertEqual([pick(odd), pick(odd)], ['own', 'own'])
      self.assertLen(logs.output, 1)
      said = 'op: reference in use: odd (for float64[2,3])'
      self.assertIn(said, logs.output[0])
      with kernels.using('gpu'), self.assertRaisesRegex(Exception, 'odd'):
        pick(odd)

  def test_a_layer_says_which_devices_its_kernel_is_for(self):
    dispatch.say_once.cache_clear()

    def pick(*devices):
      return kernels.pick(
        'op', lambda impl: impl, lambda: 'own', (), (), (), devices=devices
      )

    with target.targeting('tpu'):
      self.assertEqual(pick('gpu', 'tpu'), 'tpu')
      self.assertEqual(pick('gpu'), 'own')
    # Forced, what has none is the layer's own code.
    with kernels.using('tpu'):
      self.assertEqual(pick('gpu', 'tpu'), 'tpu')
      self.assertEqual(pick('gpu'), 'own')
    with kernels.using('reference'):
      self.assertEqual(pick('gpu'), 'reference')

  def test_float32_on_a_gpu_is_said_once(self):
    dispatch.say_once.cache_clear()
    with self.assertNoLogs('pallas_kernels', logging.WARNING):
      for name, impl, dtype in (
        ('cpu', None, 'float32'),
        ('cuda', None, 'bfloat16'),
        ('cuda', 'reference', 'float32'),
      ):
        with target.targeting(name), kernels.using(impl, dtype):
          pass
    with (
      target.targeting('cuda', '9.0'),
      self.assertLogs('pallas_kernels', logging.WARNING) as logs,
    ):
      for _ in range(2):
        tokens = jax.ShapeDtypeStruct((2, 20), jnp.int32)
        model = with_kernels(None)
        variables = jax.eval_shape(model.init, jax.random.key(0))
        jax.eval_shape(model.apply, variables, tokens)
    said = [line for line in logs.output if 'compute.dtype' in line]
    self.assertLen(said, 1)
    self.assertRegex(said[0], "float32 on cuda 9.0: .*'bfloat16'")

  def test_several_new_tokens_of_a_row_are_decoded_by_the_kernel(self):
    variables, tokens = tiny.draw(ds.build(CONFIG)), tiny.tokens(2, 14)
    logits = {}
    for impl in (None, 'reference'):
      model = with_kernels(impl)
      step = jax.jit(
        lambda t, c, model=model: model.apply(variables, t, cache=c)
      )
      out = step(tokens[:, :10], model.init_cache(2, 16))
      with counted() as seen:
        logits[impl] = step(tokens[:, 10:12], out.cache).logits
      self.assertIn(('mla_decode', impl), seen)
    self.assertLess(tiny.relative(logits['reference'], logits[None]), 1e-5)

  def test_cudnn_is_a_choice_for_rows_that_are_not_packed(self):
    attention = MLAConfig(2, None, 512, 128, 64, 128)
    compute = ComputeConfig(dtype='bfloat16', kernels='cudnn')
    config = dataclasses.replace(CONFIG, attention=attention, compute=compute)
    model = ds.build(config)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 20), jnp.int32)

    def ran(capability, segments=None):
      target_gpu = target.targeting('cuda', capability)
      with target_gpu, self.cudnn(), dispatch.recorded() as found:
        apply = lambda v, t, s: model.apply(v, t, segment_ids=s)
        jax.eval_shape(apply, variables, tokens, segments)
      return [c.impl for c in found if c.op == 'mla_prefill']

    self.assertEqual(ran('9.0'), ['cudnn'])
    self.assertEqual(ran('8.0'), ['reference'])
    dispatch.say_once.cache_clear()
    with self.assertLogs('pallas_kernels', logging.WARNING) as logs:
      self.assertEqual(ran('9.0', tokens), ['gpu'])
    self.assertIn('not given packed segments', ' '.join(logs.output))
    # No other operation knows it.
    with kernels.using('cudnn'):
      self.assertIsNone(dispatch.chosen(None))

  def cudnn(self):
    """Lets a host without a GPU trace what cuDNN would compute."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    return mock.patch.multiple(
      private,
      check_cudnn_version=lambda: 91200,
      check_compute_capability=lambda _: True,
    )

  def test_a_wrong_choice_is_named(self):
    with self.assertRaisesRegex(InputError, "compute.kernels = 'fast': use"):
      with_kernels('fast')


if __name__ == '__main__':
  absltest.main()
