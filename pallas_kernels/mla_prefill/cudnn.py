"""cuDNN's causal attention behind mla_prefill's signature.

jax's public function wants values as wide as keys, so 192/128 goes through the
private one beneath it; whatever that has against it is a reason to fall back.
"""

import jax

from pallas_kernels import dispatch, lowering_guard, target


def mla_prefill(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
  scale: float,
) -> jax.Array:
  """Returns cuDNN's attention [B T H V].

  Raises:
    NotImplementedError: the reason for which cuDNN can't be used.
  """
  if segments is not None:
    raise NotImplementedError('cuDNN is not given packed segments')
  if not dispatch.on_hopper():
    raise NotImplementedError(
      f'the target, {target.current()}, is not a Hopper GPU'
    )
  if max(q.shape[-1], v.shape[-1]) > 256 or q.dtype.itemsize != 2:
    raise NotImplementedError(
      f'cuDNN takes 16 bits and dims up to 256, not {q.dtype} of '
      f'{q.shape[-1]} and {v.shape[-1]}'
    )
  q, k, v = lowering_guard.guarded((q, k, v))
  if q.shape[-1] == v.shape[-1]:
    return jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=True, implementation='cudnn'
    )
  try:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    causal = cudnn.MaskType.CAUSAL
    return cudnn.dot_product_attention(q, k, v, scale=scale, mask_type=causal)
  # Private: a version of jax may have moved it, and cuDNN's checks raise any.
  except (AttributeError, ImportError, RuntimeError, TypeError) as error:
    raise NotImplementedError(f'cuDNN: {error}') from error
