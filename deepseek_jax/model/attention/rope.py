"""Rotates channels by position (arXiv:2104.09864), with length extension.

Channel pair i rotates by position * frequency[i]. `interleaved` pairs channels
(2i, 2i+1), the layout of the released DeepSeek attention weights; otherwise
channel i pairs with i + R/2 (Llama, the V3.2 indexer).
YaRN: arXiv:2309.00071; DeepSeek's mscale: V2 section 3.1.4.
Legend: B batch, T tokens, R rope dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """Slows low frequencies by `factor`; `mscale_all_dim` sharpens the softmax.

  With `attention_factor` None the cos/sin multiplier is
  mscale(factor, mscale) / mscale(factor, mscale_all_dim), or 0.1 ln(factor) + 1
  when either is absent (the reading of transformers).

  Attributes:
    factor: how many times longer texts become.
    original_length: tokens of the texts before.
    beta_fast: rotations in the original length from which a frequency stays.
    beta_slow: rotations up to which a frequency is slowed by all of `factor`.
    mscale: of cos and sin, as above; None: absent.
    mscale_all_dim: of the softmax, squared; None: absent.
    attention_factor: the cos/sin multiplier itself, or None.
  """

  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = 1.0
  mscale_all_dim: float | None = 1.0
  attention_factor: float | None = None

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'yarn.', factor=1, original_length=1)
    at_least(self, 'yarn.', mscale=0, mscale_all_dim=0)
    above(self, 'yarn.', beta_slow=0, attention_factor=0)
    at_least(self, 'yarn.', beta_fast=self.beta_slow)


@dataclasses.dataclass(frozen=True)
class Llama3Config:
  """Slows long wavelengths by `factor`: Llama 3.1's length extension.

  Attributes:
    factor: how many times longer texts become.
    low_factor: wavelengths above original_length / low_factor are slowed.
    high_factor: those below original_length / high_factor stay.
    original_length: tokens of the texts before.
  """

  factor: float = 8.0
  low_factor: float = 1.0
  high_factor: float = 4.0
  original_length: int = 8192

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'llama3.', factor=1, original_length=1)
    above(self, 'llama3.', low_factor=0)
    above(self, 'llama3.', high_factor=self.low_factor)


@dataclasses.dataclass(frozen=True)
class LinearConfig:
  """Divides positions by `factor` (arXiv:2306.15595), as in DeepSeek-Coder.

  Attributes:
    factor: how many times longer texts become.
  """

  factor: float = 4.0

  def __post_init__(self):
    """Raises InputError unless factor is above 0 and finite."""
    above(self, 'scaling.', factor=0)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Describes a rotation.

  Attributes:
    theta: base of the frequencies.
    interleaved: pairs channels (2i, 2i+1), not (i, i + R/2).
    scaling: extension to longer texts, or None.
  """

  theta: float = 10000.0
  interleaved: bool = True
  scaling: YarnConfig | Llama3Config | LinearConfig | None = None

  def __post_init__(self):
    """Raises InputError unless theta > 1."""
    above(self, 'rope.', theta=1)


def mscale(factor: float, weight: float | None) -> float:
  """Returns YaRN's temperature 0.1 weight ln(factor) + 1; 1 if not extended."""
  if factor <= 1 or not weight:
    return 1.0
  return 0.1 * weight * math.log(factor) + 1.0


def softmax_multiplier(cfg: RopeConfig) -> float:
  """Returns YaRN's factor of the softmax scale: mscale(mscale_all_dim)^2."""
  if isinstance(cfg.scaling, YarnConfig):
    return mscale(cfg.scaling.factor, cfg.scaling.mscale_all_dim) ** 2
  return 1.0


def table_multiplier(cfg: RopeConfig) -> float:
  """Returns YaRN's factor of cos and sin; 1 for every released DeepSeek."""
  yarn = cfg.scaling
  if not isinstance(yarn, YarnConfig):
    return 1.0
  if yarn.attention_factor is not None:
    return yarn.attention_factor
  if yarn.mscale and yarn.mscale_all_dim:
    return mscale(yarn.factor, yarn.mscale) / mscale(
      yarn.factor, yarn.mscale_all_dim
    )
  return mscale(yarn.factor, 1.0)


def frequencies(cfg: RopeConfig, dim: int) -> np.ndarray:
  """Returns the angles per position, [R/2] float64, in radians.

  Raises:
    InputError: an odd `dim`.
  """
  if dim % 2:
    raise InputError(f'rope_dim = {dim}: must be even')
  base = cfg.theta ** (-np.arange(0, dim, 2) / dim)
  if isinstance(cfg.scaling, YarnConfig):
    return _yarn(cfg.scaling, base, cfg.theta, dim)
  if isinstance(cfg.scaling, Llama3Config):
    return _llama3(cfg.scaling, base)
  if isinstance(cfg.scaling, LinearConfig):
    return base / cfg.scaling.factor
  return base


def _yarn(
  yarn: YarnConfig, base: np.ndarray, theta: float, dim: int
) -> np.ndarray:
  """Slows the channels that rotate less often than beta_fast, by a ramp."""

  def turns(n: float) -> float:
    """Returns the channel that rotates n times in the original length."""
    ratio = yarn.original_length / (n * 2 * math.pi)
    return dim * math.log(ratio) / (2 * math.log(theta))

  low = max(math.floor(turns(yarn.beta_fast)), 0)
  high = min(math.ceil(turns(yarn.beta_slow)), dim - 1)
  # transformers widens an empty ramp by the same 0.001.
  width = (high - low) or 0.001
  ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
  return base * (1 - ramp) + base / yarn.factor * ramp


def _llama3(llama: Llama3Config, base: np.ndarray) -> np.ndarray:
  """Slows the channels that rotate less often than high_factor, by a ramp."""
  turns = llama.original_length * base / (2 * math.pi)
  share = (turns - llama.low_factor) / (llama.high_factor - llama.low_factor)
  keep = np.clip(share, 0, 1)
  return base * keep + base / llama.factor * (1 - keep)


def rope(x: jax.Array, positions: jax.Array, cfg: RopeConfig) -> jax.Array:
  """Rotates x [B T ... R] to positions [B T], in float32; keeps the dtype."""
  freqs = jnp.asarray(frequencies(cfg, x.shape[-1]), jnp.float32)
  angles = positions[..., None].astype(jnp.float32) * freqs  # [B T R/2]
  # Axes of x between tokens and channels share the angles.
  angles = angles.reshape(
    *positions.shape, *(1,) * (x.ndim - positions.ndim - 1), freqs.size
  )
  multiplier = table_multiplier(cfg)
  cos, sin = jnp.cos(angles) * multiplier, jnp.sin(angles) * multiplier
  y = x.astype(jnp.float32)
  if cfg.interleaved:
    a, b = y[..., 0::2], y[..., 1::2]
    out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.reshape(x.shape).astype(x.dtype)
  a, b = jnp.split(y, 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)
