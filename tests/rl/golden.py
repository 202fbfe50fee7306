"""The batch and the numbers of TRL 1.16's GRPO, computed once in float64."""

import numpy as np

NEW = np.array(
  [
    [-1.0, -0.5, -2.0, -0.3, -1.2],
    [-0.7, -1.1, -0.9, -2.2, -0.4],
    [-1.6, -0.2, -0.8, -1.4, -0.6],
    [-0.9, -1.3, -0.1, -0.5, -2.5],
  ]
)
OLD = NEW + np.array(
  [
    [0.1, -0.3, 0.25, 0.0, 0.4],
    [-0.2, 0.5, 0.3, -0.4, 0.1],
    [0.05, -0.05, 0.6, 0.2, -0.1],
    [0.3, 0.9, -0.25, 0.1, 0.0],
  ]
)
REFERENCE = NEW + np.array(
  [
    [0.2, 0.1, -0.3, 0.4, 0.0],
    [0.0, -0.5, 0.2, 0.1, 0.3],
    [-0.1, 0.2, 0.0, 0.5, -0.2],
    [0.4, -0.3, 0.1, -0.1, 0.2],
  ]
)
LENGTHS = np.array([5, 3, 4, 2])
MASK = (np.arange(5) < LENGTHS[:, None]).astype(np.float64)
ADVANTAGES = np.array([1.0, -0.5, 0.8, -1.3])

# name -> (fields of GRPOConfig, on-policy, arguments of TRL's oracle, loss,
# norm of the gradient).
_DAPO = {'clip_high': 0.28}
_KL = {'kl': 'k3', 'kl_weight': 0.1}
_RATIO_KL = {'kl': 'ratio_k3', 'kl_weight': 0.1}
CASES = {
  'grpo': (_DAPO, False, {}, -0.0226416096, 0.1312640692),
  'token mean': (
    _DAPO | {'aggregation': 'token_mean'},
    False,
    {'loss_type': 'dapo'},
    -0.2742350854,
    0.1621872345,
  ),
  'micro-batch mean': (
    _DAPO | {'aggregation': 'micro_batch_mean'},
    False,
    {'loss_type': 'bnpo'},
    -0.2742350854,
    0.1621872345,
  ),
  'constant': (
    _DAPO | {'aggregation': 'constant', 'length': 8},
    False,
    {'loss_type': 'dr_grpo'},
    -0.1199778499,
    0.0709569151,
  ),
  'symmetric': (
    {},
    False,
    {'epsilons': (0.2, 0.2)},
    -0.0186416096,
    0.1312640692,
  ),
  'R1 clips at 10': (
    {'clip_low': 10.0, 'clip_high': 10.0},
    False,
    {'epsilons': (10.0, 10.0)},
    -0.1102111494,
    0.2055091518,
  ),
  'k3': (
    _DAPO | _KL,
    False,
    {'beta': 0.1, 'unbiased': False},
    -0.0180278693,
    0.1341142922,
  ),
  'ratio k3': (
    _DAPO | _RATIO_KL,
    False,
    {'beta': 0.1},
    -0.0192330667,
    0.1332345293,
  ),
  'on-policy k3': (
    _DAPO | _KL,
    True,
    {'beta': 0.1, 'unbiased': False},
    0.0046137403,
    0.2838125344,
  ),
  'on-policy ratio k3': (
    _DAPO | _RATIO_KL,
    True,
    {'beta': 0.1},
    0.0046137403,
    0.2845634144,
  ),
  'off-policy mask': (
    _DAPO | {'off_policy_bound': 0.1},
    False,
    {'off_policy': 0.1},
    -0.4002000579,
    0.1209970348,
  ),
  'off-policy mask and ratio k3': (
    _DAPO | _RATIO_KL | {'off_policy_bound': 0.1},
    False,
    {'off_policy': 0.1, 'beta': 0.1},
    -0.3967915149,
    0.1231319063,
  ),
  'sequence ratio': (
    _DAPO | {'ratio': 'sequence'},
    False,
    {'level': 'sequence'},
    -0.0298876028,
    0.1436500203,
  ),
  'cispo': (
    {
      'surrogate': 'cispo',
      'clip_low': None,
      'clip_high': 4.0,
      'aggregation': 'token_mean',
    },
    False,
    {'loss_type': 'cispo', 'epsilons': (0.2, 5.0)},
    0.3033883073,
    0.2071903808,
  ),
}
