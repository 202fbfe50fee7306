"""Computes log-probabilities of sampled tokens, and entropies, in chunks.

They are those of the sampling distribution: logits are divided by the
temperature before the softmax, and what top-p or top-k left out is left out.
Legend: B rows, T tokens, N = B T, D model, V vocabulary, W 32-bit words.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.infer.kept_tokens import unpacked
from deepseek_jax.model.attention.query_blocks import each
from deepseek_jax.train.cross_entropy import (
  float32_logits,
  join_tokens,
  split_tokens,
)


def sampled(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  *,
  temperature: float = 1.0,
  kept: jax.Array | None = None,
  chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
  """Returns log-probs of tokens and entropies; logits exist in chunks.

  Args:
    hidden: [B T D]; head: [D V].
    labels: [B T] int32, any value where the mask is 0.
    mask: [B T], 0 where no token was sampled.
    temperature: divides the logits.
    kept: [B T W] uint32, the tokens that sampling kept, see
      `infer.kept_tokens`; the sampled one always counts, and no bit at all
      means no limit.
    chunk: tokens at a time, at most.

  Returns:
    Log-probs [B T], differentiable, and entropies [B T] of the distribution
    without the limit and without a gradient; float32, 0 where the mask is.
  """
  D, V = head.shape
  on = (mask > 0).reshape(-1)
  flat = [hidden.reshape(-1, D), jnp.where(on, labels.reshape(-1), 0), on]
  if kept is not None:
    flat.append(kept.reshape(-1, kept.shape[-1]))
  parts = split_tokens(chunk, *flat)

  def one(part: tuple, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, labels, on = part[:3]
    logits = float32_logits(h, head) / temperature
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits))
    entropy = -(jnp.exp(log_p) * log_p).sum(axis=-1)
    if kept is not None:
      keep = unpacked(part[3], V)
      keep |= ~keep.any(axis=-1, keepdims=True)
      keep |= labels[:, None] == jnp.arange(V)
      logits = jnp.where(keep, logits, -jnp.inf)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    said = picked - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(on, said, 0.0), jnp.where(on, entropy, 0.0)

  out = each(one, parts, (head,))
  N, shape = len(flat[0]), labels.shape
  return tuple(join_tokens(a, N).reshape(shape) for a in out)
