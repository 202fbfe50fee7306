"""A model with copies of experts is the same function, more evenly spread."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.infer import redundant_experts as redundant
from tests import tiny

E, COPIES, DEVICES = 8, 16, 4


def load_on_devices(experts, copies, counts):
  """Tokens per device, every token taking the copies of an expert in turn."""
  out = np.zeros(DEVICES, int)
  for token, chosen in enumerate(experts.reshape(-1, experts.shape[-1])):
    for e in chosen:
      out[copies[e, token % counts[e]] // (COPIES // DEVICES)] += 1
  return out


class RedundantTest(absltest.TestCase):
  def test_copies_change_no_number_and_even_out_devices(self):
    config = tiny.config('v3')
    tokens = tiny.tokens(4, 16)
    run = tiny.jitted('v3', mtp=True)
    want = run(tiny.variables('v3'), tokens)
    load = ds.moe_statistics(want.aux, 'load')
    made, variables = redundant.with_copies(
      config, tiny.variables('v3'), load, COPIES - E, nodes=2, devices=DEVICES
    )
    model = ds.build(made)
    got = jax.jit(model.apply, static_argnames='mtp')(
      variables, tokens, mtp=True
    )
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(got.aux['mtp_hidden'], want.aux['mtp_hidden']):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ds.moe_statistics(got.aux, 'load'), load)
    ffn = variables['buffers']['segments'][1][0]['ffn']
    experts = np.asarray(ds.moe_statistics(want.aux, 'experts'))
    for layer in range(2):
      spread = load_on_devices(
        experts[layer],
        np.asarray(ffn['copies'][layer]),
        np.asarray(ffn['copy_count'][layer]),
      )
      before = np.asarray(load[layer]).reshape(DEVICES, -1).sum(axis=1)
      self.assertEqual(spread.sum(), before.sum())
      self.assertLess(spread.max(), before.max())

  def test_copies_are_not_for_training(self):
    config = ds.changed(tiny.config('v3'), {'moe.redundant': 2})
    model = ds.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with self.assertRaisesRegex(ds.InputError, 'redundant = 2'):
      jax.eval_shape(
        lambda v: model.apply(v, tiny.tokens(1, 4), train=True), shapes
      )

  def test_what_does_not_fit_is_refused(self):
    config, variables = tiny.config('v3'), tiny.variables('v3')
    load = np.ones((2, E))
    with self.assertRaisesRegex(ds.InputError, 'num_replicas = 11'):
      redundant.with_copies(config, variables, load, 3, devices=4)
    with self.assertRaisesRegex(ds.InputError, 'redundant = 0'):
      redundant.with_copies(config, variables, load, 0)
    twice = dataclasses.replace(
      config, moe=dataclasses.replace(config.moe, redundant=1)
    )
    with self.assertRaisesRegex(ds.InputError, 'without redundant'):
      redundant.with_copies(twice, variables, load, 1)


if __name__ == '__main__':
  absltest.main()
