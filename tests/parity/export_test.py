"""A model trained here generates the same text in transformers."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity_harness as ph
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import hf

_CONFIG = ds.changed(
  ds.presets.v3_tiny(),
  {
    'vocab_size': 32,
    'dim': 32,
    'attention.heads': 2,
    'attention.q_rank': 24,
    'ffn.width': 48,
    'moe.experts': 8,
    'moe.width': 16,
    'layout': ((('dense', 'moe'), 1),),
  },
)


def _trained(config, ids, steps=30):
  """A few steps on counting, from which greedy text is no coincidence."""
  model = ds.build(config)
  variables = model.init(jax.random.key(0))
  optimizer = optax.adam(1e-2)

  def loss(params):
    out = model.apply({**variables, 'params': params}, ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      out.logits[:, :-1], ids[:, 1:]
    )
    return losses.mean()

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  params = variables['params']
  state = optimizer.init(params)
  for _ in range(steps):
    params, state, value = step(params, state)
  noise = np.random.default_rng(0)
  bias = lambda a: jnp.asarray(0.1 * noise.standard_normal(a.shape, np.float32))
  buffers = jax.tree.map(bias, variables['buffers'])
  return {'params': params, 'buffers': buffers}, float(value)


class ExportTest(absltest.TestCase):
  def test_transformers_continues_greedily_as_we_do(self):
    start = np.arange(0, 32, 2)[:, None]
    ids = jnp.asarray((start + 3 * np.arange(24)) % 32, jnp.int32)
    variables, loss = _trained(_CONFIG, ids)
    self.assertLess(loss, 1.5)  # of log(32) = 3.5
    prompt = [[3, 6, 9, 12], [20, 23, 26, 29]]
    ours = ds.generate(
      ds.build(_CONFIG), variables, prompt, max_new_tokens=20, temperature=0.0
    )
    with tempfile.TemporaryDirectory() as folder:
      extra = {'eos_token_id': 1, 'bos_token_id': 0, 'pad_token_id': 0}
      hf.save(folder, _CONFIG, variables, extra=extra)
      model = ph.transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=ph.torch.float32, attn_implementation='eager'
      ).eval()
    self.assertIsInstance(model, ph.transformers.DeepseekV3ForCausalLM)
    theirs = model.generate(
      ph.torch.tensor(prompt),
      attention_mask=ph.torch.ones(2, 4).long(),
      max_new_tokens=20,
      do_sample=False,
      eos_token_id=None,
    )
    self.assertEqual(theirs[:, 4:].tolist(), ours)
    self.assertGreater(len(set(ours[0])), 5)


if __name__ == '__main__':
  absltest.main()
