"""Libraries of torch on the same numbers, timed by CUDA events.

Each contender is called without arguments, gives microseconds, and raises
ImportError with the reason where the library isn't here.
"""

import functools
import importlib
import statistics

import jax.numpy as jnp


@functools.cache
def torch_with_cuda():
  torch = importlib.import_module('torch')
  if not torch.cuda.is_available():
    raise ImportError(f'torch {torch.__version__} finds no CUDA')
  return torch


def shared(x):
  """The array as a tensor on the same memory."""
  return importlib.import_module('torch').from_dlpack(x)


def events_us(fn, iterations=20) -> float:
  """Median microseconds between CUDA events around each call."""
  torch = torch_with_cuda()
  fn()
  pairs = []
  for _ in range(iterations):
    pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    pair[0].record()
    fn()
    pair[1].record()
    pairs.append(pair)
  torch.cuda.synchronize()
  return 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs)


def grouped_mm(rows, weights, counts):
  """rows [M D] bf16, weights [E D F], counts [E] -> a call that multiplies."""
  torch = importlib.import_module('torch')
  # Public since 2.10; before, the same under another name.
  product = getattr(torch.nn.functional, 'grouped_mm', None)
  product = product or getattr(torch, '_grouped_mm', None)
  if product is None:
    raise ImportError(f'torch {torch.__version__} has no grouped matmul')
  ends = shared(jnp.cumsum(counts, dtype=jnp.int32))
  left, right = shared(rows), shared(weights)
  return lambda: product(left, right, offs=ends)


def grouped_mm_us(rows, weights, counts) -> float:
  torch_with_cuda()
  return events_us(grouped_mm(rows, weights, counts))


def flash_mla_us(q_c, q_r, c, k_r, table, lengths, scale) -> float:
  """FlashMLA's dense decoding, its schedule made beforehand."""
  torch_with_cuda()
  library = importlib.import_module('flash_mla')
  q = shared(jnp.concatenate([q_c, q_r], axis=-1))
  cache = shared(jnp.concatenate([c, k_r], axis=-1)[:, :, None])
  table, lengths = shared(table), shared(lengths)
  schedule = library.get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)

  def call():
    return library.flash_mla_with_kvcache(
      q, cache, table, lengths, 512, *schedule, softmax_scale=scale, causal=True
    )

  return events_us(call)
