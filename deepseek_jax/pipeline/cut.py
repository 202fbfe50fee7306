"""Cuts a model's blocks into pipeline stages of even runs."""

from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer_config import TransformerConfig


def stage_places(config: TransformerConfig, count: int) -> tuple[tuple, ...]:
  """Returns the places of each of `count` stages: layers, then MTP blocks.

  Places are ('start',), ('block', i) for layer i, ('mtp', k) and ('end',). A
  last stage that reads the embedding (a tied head, or multi-token prediction)
  holds it too.

  Raises:
    InputError: there are fewer blocks than stages.
  """
  layers = [('block', i) for i in range(config.layers)]
  layers += [('mtp', k) for k in range(config.mtp.depth)]
  P, n = count, len(layers)
  if n < P:
    raise InputError(
      f'mesh.stage = {P}: more than the {n} blocks; set it to {n} or less'
    )
  runs = [layers[s * n // P : (s + 1) * n // P] for s in range(P)]
  runs[0].insert(0, ('start',))
  if P > 1 and (config.tied or config.mtp.depth):
    runs[-1].append(('start',))
  runs[-1].append(('end',))
  return tuple(map(tuple, runs))
