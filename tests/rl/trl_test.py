"""The GRPO family against TRL itself, run in float64; minutes to import."""

import collections
import os
import types

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax.rl import grpo
from deepseek_jax.rl.advantages import AdvantageConfig, advantages
from tests.rl import golden, policy_test

pytestmark = pytest.mark.slow


class Accelerator:
  num_processes = 1
  sync_gradients = True

  def reduce(self, x, reduction=None):
    return x

  def gather(self, x):
    return x

  gather_for_metrics = gather


def trl_loss(
  on_policy,
  loss_type='grpo',
  beta=0.0,
  unbiased=True,
  level='token',
  off_policy=None,
  delta=None,
  epsilons=(0.2, 0.28),
):
  """Returns the loss and gradient of `GRPOTrainer._compute_loss`."""
  os.environ['HF_HUB_OFFLINE'] = '1'
  import torch
  from trl.trainer.grpo_trainer import GRPOTrainer

  tensor = lambda a: torch.tensor(a, dtype=torch.float64)
  B, T = golden.NEW.shape
  new = tensor(golden.NEW).requires_grad_(True)
  fake = types.SimpleNamespace(
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=off_policy,
    get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    importance_sampling_level=level,
    beta=beta,
    args=types.SimpleNamespace(
      use_bias_correction_kl=unbiased, delta=delta, steps_per_generation=1
    ),
    loss_type=loss_type,
    epsilon_low=epsilons[0],
    epsilon_high=epsilons[1],
    use_vllm=False,
    vllm_importance_sampling_correction=False,
    current_gradient_accumulation_steps=1,
    model=types.SimpleNamespace(training=True),
    accelerator=Accelerator(),
    _entropy_bonus_enabled=False,
    max_completion_length=8,
    _metrics={'train': collections.defaultdict(list)},
    _get_per_token_logps_and_entropies=lambda *a, **k: (
      new,
      torch.zeros(B, T),
      None,
    ),
  )
  ids = torch.zeros(B, T, dtype=torch.long)
  inputs = {
    'prompt_ids': ids[:, :2],
    'prompt_mask': torch.ones(B, 2, dtype=torch.long),
    'completion_ids': ids,
    'completion_mask': torch.tensor(golden.MASK.astype(int)),
    'advantages': tensor(golden.ADVANTAGES),
    'num_items_in_batch': tensor(golden.MASK.sum()),
    'ref_per_token_logps': tensor(golden.REFERENCE),
  }
  if not on_policy:
    inputs['old_per_token_logps'] = tensor(golden.OLD)
  loss = GRPOTrainer._compute_loss(fake, None, inputs)
  loss.backward()
  return loss.item(), new.grad.numpy()


class TRLTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (name.replace(' ', '_'), name) for name in golden.CASES
  )
  def test_loss_and_every_gradient_are_equal(self, name):
    fields, on_policy, asked, *_ = golden.CASES[name]
    batch = {'old': None} if on_policy else {}
    self.check(fields, on_policy, asked, batch)

  def test_dual_clip_is_its_delta(self):
    fields = {'clip_high': 0.28, 'dual_clip': 1.5}
    self.check(fields, False, {'delta': 1.5}, {})

  def check(self, fields, on_policy, asked, batch):
    want, gradient = trl_loss(on_policy, **asked)
    loss, found = policy_test.value_and_grad(grpo.GRPOConfig(**fields), **batch)
    self.assertAlmostEqual(loss, want, delta=1e-12)
    np.testing.assert_allclose(found, gradient, atol=1e-12)

  def test_advantages_divide_by_its_deviation(self):
    import torch
    from trl.trainer.utils import nanstd

    rewards = np.random.default_rng(0).normal(size=(5, 6))
    rewards[1, 2] = np.nan
    std = nanstd(torch.tensor(rewards), dim=1).numpy()[:, None]
    want = (rewards - np.nanmean(rewards, 1, keepdims=True)) / (std + 1e-4)
    found = advantages(rewards, AdvantageConfig(eps=1e-4)).values
    np.testing.assert_allclose(found, np.nan_to_num(want), atol=1e-12)


if __name__ == '__main__':
  absltest.main()
