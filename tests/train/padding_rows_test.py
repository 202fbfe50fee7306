"""Rows of padding alone count nowhere: in no loss, metric or gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.train import step as train
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.objective import Shares, next_token, total_weight
from deepseek_jax.train.schedules import BatchConfig, ScheduleConfig
from tests import tiny
from tests.infer import families

B, T = 4, 20
BALANCE = {
  f'moe.balance.{name}': value
  for name, value in (
    ('sequence', 0.1),
    ('expert', 0.2),
    ('device', 0.3),
    ('communication', 0.4),
    ('devices', 2),
  )
}
CHANGES = {
  'v3': BALANCE,
  'step': BALANCE,
  'dsa': {'attention.recall_queries': 8},
  'v4': {},
}


@functools.cache
def model(name):
  made = tiny.config(name) if name == 'step' else families.config(name)
  return ds.build(ds.changed(made, CHANGES[name]))


@functools.cache
def variables(name):
  return tiny.draw(model(name))


def rows():
  return tiny.documents(B, T + 1, padding=5)


def spread(batch, places, count):
  """Returns a batch of `count` rows, the given ones at `places`."""

  def one(a):
    out = np.zeros((count, *a.shape[1:]), a.dtype)
    out[places] = a
    return out

  return jax.tree.map(one, batch)


@functools.cache
def gradient(name):
  def loss(params, buffers, batch):
    shares = Shares(total_weight(next_token(batch)), 1, jnp.float32(0.3))
    held = {'params': params, 'buffers': buffers}
    return train.loss_and_metrics(
      model(name), held, batch, shares, tiny.PRETRAINING
    )

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def step(name, accumulate):
  cfg = TrainConfig(
    tokens=1e6,
    batch=BatchConfig(2 * B, accumulate=accumulate),
    schedule=ScheduleConfig('constant', peak=0.01, warmup=0),
  )
  state = train.initial_state(model(name), cfg, variables(name))
  return jax.jit(train.train_step(model(name), cfg)), state


def close(a, b):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), a, b
  )


class PaddingRowsTest(parameterized.TestCase):
  @parameterized.parameters('v3', 'dsa', 'v4')
  def test_they_change_no_loss_metric_or_gradient(self, name):
    held = variables(name)
    run = lambda batch: gradient(name)(held['params'], held['buffers'], batch)
    want, grads = run(rows())
    got, ours = run(spread(rows(), [1, 2, 5, 6], 7))
    self.assertTrue({'balance_loss', 'attention_loss'} & set(want[1]))
    close(got, want)
    close(ours, grads)

  @parameterized.parameters('step', 'dsa')
  def test_nor_does_a_micro_batch_of_many(self, name):
    batch = spread(rows(), [0, 2, 3, 6], 2 * B)
    taken = []
    for accumulate in (1, 2):
      run, state = step(name, accumulate)
      taken.append(run(state, batch)[1])
    close(*taken)


if __name__ == '__main__':
  absltest.main()
