"""Like interpreted.py, for what serves and selects cached latents.

python tests/pallas_kernels/interpreted_sparse.py OP
"""

import functools
import sys
from unittest import mock

import interpreted
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat
from pallas_kernels import latent_kv as latent
from pallas_kernels.compress import compress
from pallas_kernels.compress import shapes as compress_shapes
from pallas_kernels.index_candidates import gpu as candidates_gpu
from pallas_kernels.index_candidates import index_candidates
from pallas_kernels.index_candidates import shapes as candidates_shapes
from pallas_kernels.indexer import gpu as indexer_gpu
from pallas_kernels.indexer import indexer
from pallas_kernels.indexer import shapes as indexer_shapes
from pallas_kernels.latent_kv import shapes as latent_shapes
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.sparse_gqa import shapes as gqa_shapes
from pallas_kernels.sparse_gqa import sparse_gqa
from pallas_kernels.sparse_mla import (
  ChosenKeys,
  attend,
  latent_gradient,
  shares,
)
from pallas_kernels.sparse_mla import shapes as sparse_shapes

BF16 = interpreted.BF16


def compare_fp8(name, op, args, share=0.01):
  """op -> ((codes, scales), rest): codes may differ by a step, few of them."""
  want = jax.tree.map(np.asarray, op(*args, impl='reference'))
  with compat.interpreted():
    got = jax.tree.map(np.asarray, op(*args, impl='gpu'))
  codes = lambda tree: np.asarray(tree[0][0]).view(np.uint8).astype(int)
  apart = np.abs(codes(got) - codes(want))
  print(f'{name}: {(apart > 0).mean():.1e} of the codes a step apart')
  if apart.max() > 1 or (apart > 0).mean() > share:
    sys.exit(f'{name}: codes up to {apart.max()} steps apart')
  rest = lambda tree: (tree[0][1], tree[1])
  fixed = {'reference': rest(want), 'gpu': rest(got)}
  interpreted.compare(name, lambda impl: fixed[impl], (), BF16)


def draw_latent_kv(shape):
  rng = np.random.default_rng(0)
  N, size = shape.tokens, (shape.pages, shape.page)
  bf = lambda *s: jnp.asarray(rng.normal(size=s), jnp.bfloat16)
  angles = rng.uniform(0, 2 * np.pi, (N, 32))
  slots = rng.permutation(shape.pages * shape.page)[:N]
  if N > 4:
    slots[1], slots[4] = -1, shape.pages * shape.page
  cache = latent.Pages(bf(*size, 512), bf(*size, 64))
  if shape.fp8:
    scales = jnp.asarray(rng.random((*size, 4)), jnp.float32)
    c = cache.c.astype(jnp.float8_e4m3fn)
    cache = latent.FP8Pages(c, scales, cache.k_r)
  floats = [
    jnp.asarray(a, jnp.float32) for a in (np.cos(angles), np.sin(angles))
  ]
  return (
    bf(N, shape.dim),
    bf(shape.dim, 576),
    jnp.asarray(rng.random(512), jnp.float32),
    *floats,
    jnp.asarray(slots, jnp.int32),
    cache,
  )


def check_latent_kv():
  for name, shape in latent_shapes.TEST_GPU.items():
    args = draw_latent_kv(shape)
    op = functools.partial(
      latent.latent_kv, interleaved=shape.interleaved, splits=shape.splits
    )
    if not shape.fp8:
      interpreted.compare(name, op, args, BF16)
      continue

    def split(*args, impl, op=op):
      c, scales, k_r = op(*args, impl=impl)
      return (c, scales), k_r

    compare_fp8(name, split, args)


def check_mla_decode_fp8():
  for name, shape in decode_shapes.TEST.items():
    q_c, q_r, c, k_r, *rest = interpreted.draw_mla_decode(shape)
    rng = np.random.default_rng(1)
    scales = jnp.asarray(rng.random((*c.shape[:2], 4)) + 0.5, jnp.float32)
    splits = shape.splits or 1
    op = functools.partial(mla_decode, scale=0.05, splits=splits)

    def run(*args, impl, op=op):
      *args, scales = args
      return op(*args, scales=scales, impl=impl)

    c = interpreted.poison(c, *rest).astype(jnp.float8_e4m3fn)
    args = (q_c, q_r, c, k_r, *rest, scales)
    # Latents times scales and probabilities are rounded to bfloat16.
    interpreted.compare(name, run, args, 2 * BF16)


def draw_index(shape):
  """Queries, keys, weights; small integers: scores are exact, often equal."""
  rng = np.random.default_rng(0)
  B, T, S = shape.batch, shape.queries, shape.keys
  whole = lambda low, *size: rng.integers(low, 3, size)
  q = whole(-2, B, T, shape.heads, 128) * (rng.random(128) < 0.05)
  return (
    jnp.asarray(q, jnp.bfloat16),
    jnp.asarray(whole(-2, B, S, 128), jnp.bfloat16),
    jnp.asarray(whole(-1, B, T, shape.heads), jnp.float32),
  )


def draw_indexer(shape):
  B, T, S = shape.batch, shape.queries, shape.keys
  last = np.broadcast_to(np.arange(S - T, S) + 1, (B, T))
  first = np.broadcast_to(last // 2 if shape.packed else 0, (B, T))
  span = (jnp.asarray(a, jnp.int32) for a in (first, last))
  return *draw_index(shape), *span


def in_float8(q, k, w, *span):
  """The same in float8, which holds small integers, with scales of 2**n."""
  rng = np.random.default_rng(1)
  power = lambda shape: jnp.asarray(
    2.0 ** rng.integers(-3, 4, shape), 'float32'
  )
  codes = (a.astype(jnp.float8_e4m3fn) for a in (q, k))
  return *codes, w, *span, power(q.shape[:3]), power(k.shape[:2])


def check_indexer(float8=False):
  def scaled(*args, top_k, impl):
    *args, q_scale, k_scale = args
    scales = {'q_scale': q_scale, 'k_scale': k_scale}
    return indexer(*args, top_k=top_k, **scales, impl=impl)

  for name, shape in indexer_shapes.TEST_GPU.items():
    args = draw_indexer(shape)
    args = in_float8(*args) if float8 else args
    near = 0 if shape.far else None
    limit = functools.partial(indexer_gpu.indexer, near=near)
    # One thread block takes all queries in turn, or eight share the keys.
    blocks = 4 * shape.batch * -(-shape.queries // 2) if shape.shared else 1
    sms = mock.patch.object(compat, 'num_sms', lambda blocks=blocks: blocks)
    with mock.patch.object(indexer_gpu, 'indexer', limit), sms:
      op = scaled if float8 else indexer
      op = functools.partial(op, top_k=shape.top_k)
      interpreted.compare(name, op, args, 0.0)


def check_indexer_fp8():
  check_indexer(float8=True)


def check_index_candidates():
  for name, shape in candidates_shapes.TEST_GPU.items():
    q, k, w = draw_index(shape)
    starts, last = map(jnp.array, candidates_shapes.blocks(shape))
    starts = starts.at[0, -1, 0].set(-1)  # no block, ahead of others
    last = last.at[0, 0].set(0)  # no key
    # Nobody may choose what is nobody's.
    at = jnp.arange(shape.keys)
    inside = (at >= starts[..., None]) & (at < starts[..., None] + shape.size)
    inside = (inside & (starts >= 0)[..., None]).any(axis=2)
    inside &= at < last[..., None]
    k = jnp.where(inside.any(axis=1)[..., None], k, jnp.nan)
    op = functools.partial(index_candidates, size=shape.size, top_k=shape.top_k)
    # All queries at once on few multiprocessors, and two at a time.
    sms = mock.patch.object(compat, 'num_sms', lambda n=shape.queries: n)
    two = 2 * -(-shape.count * shape.size // 64) * 64
    limit = mock.patch.object(candidates_gpu, '_AT_ONCE', two)
    with sms:
      interpreted.compare(name, op, (q, k, w, starts, last), 0.0)
    with limit:
      interpreted.compare(f'{name} in turn', op, (q, k, w, starts, last), 0.0)


def draw_sparse_mla(shape):
  """Queries, latents and sinks; choices; gradient of the output."""
  rng = np.random.default_rng(0)
  size, H = (shape.batch, shape.queries), shape.heads
  bf = lambda *s: jnp.asarray(rng.normal(size=s), jnp.bfloat16)
  rope = lambda *s: bf(*s, shape.rope) if shape.rope else None
  latents, indices = [], []
  for S, K in filter(None, ((shape.keys, shape.top_k), shape.far)):
    rows = [rng.permutation(S)[:K] for _ in range(np.prod(size))]
    index = np.stack(rows).reshape(*size, -1)
    index = np.where(rng.random(index.shape) < shape.nothing, -1, index)
    if shape.far and not indices:
      index[:, 0] = -1  # all that the first query reads is of the second list
    latents.append((bf(shape.batch, S, shape.width), rope(shape.batch, S)))
    indices.append(jnp.asarray(index, jnp.int32))
  sinks = jnp.asarray(rng.normal(size=H), jnp.float32) if shape.sinks else None
  queries = bf(*size, H, shape.width), rope(*size, H)
  return (queries, latents, sinks), indices, bf(*size, H, shape.width)


def check_sparse_mla():
  def both(floats, indices, grad, impl):
    def fn(queries, latents, sinks):
      keys = tuple(ChosenKeys(*a, i) for a, i in zip(latents, indices))
      return attend(*queries, keys, scale=0.05, sinks=sinks, impl=impl)

    (out, log_sum), pull = jax.vjp(fn, *floats)
    grads = pull((grad, jnp.zeros_like(log_sum)))
    # With one choice the gradients of its score are rounding errors.
    only = [grads[1][0][0]] if indices[0].shape[-1] == 1 else grads
    # Choices alone decide where there is no sum.
    return out, jnp.maximum(log_sum, -1e9), only

  for name, shape in sparse_shapes.TEST_GPU.items():
    # A chunk holds the parts of two queries.
    counts = shape.top_k, *(shape.far or ())[1:]
    padded = sum(-(-K // 64) * 64 for K in counts)
    parts = 2 * (shape.width + shape.rope) * padded
    with mock.patch.object(latent_gradient, '_PARTS', parts):
      # Probabilities, their gradients and a latent's parts are rounded.
      interpreted.compare(name, both, draw_sparse_mla(shape), 2 * BF16)


def check_attention_shares():
  def run(queries, keys, log_sum, impl):
    return shares(*queries, keys, log_sum, scale=0.05, impl=impl)

  for name, shape in sparse_shapes.TEST_GPU.items():
    (queries, latents, sinks), indices, _ = draw_sparse_mla(shape)
    lists = tuple(ChosenKeys(*a, i) for a, i in zip(latents, indices))
    how = {'scale': 0.05, 'sinks': sinks, 'impl': 'reference'}
    _, log_sum = attend(*queries, lists, **how)
    for number, keys in enumerate(lists):
      label, args = f'{name} {number}', (queries, keys, log_sum)
      interpreted.compare(label, run, args, 2.0**-18)


def check_sparse_gqa():
  def both(q, k, v, index, grad, impl):
    fn = functools.partial(sparse_gqa, index=index, scale=0.05, impl=impl)
    out, pull = jax.vjp(fn, q, k, v)
    return out, pull(grad)

  for name, shape in gqa_shapes.TEST_GPU.items():
    rng = np.random.default_rng(0)
    B, T, S, G, J, M, nothing, K, V = shape
    bf = lambda *s, rng=rng: jnp.asarray(rng.normal(size=s), jnp.bfloat16)
    index = rng.integers(0, S, (B, T, G, M))
    index = np.where(rng.random(index.shape) < nothing, -1, index)
    floats = bf(B, T, G, J, K), bf(B, S, G, K), bf(B, S, G, V)
    args = *floats, jnp.asarray(index, jnp.int32), bf(B, T, G, J, V)
    interpreted.compare(name, both, args, 2 * BF16)


def compress_both(floats, lasts, grad, impl):
  run = lambda *a: compress(*a, *lasts, impl=impl)
  out, pull = jax.vjp(run, *floats)
  return run(*floats), out, pull(grad)


def check_compress():
  for name, shape in compress_shapes.TEST.items():
    rng = np.random.default_rng(0)
    lasts = compress_shapes.places(shape)
    tokens = max(map(sum, shape.documents)), shape.series, shape.dim
    rows = len(shape.documents)
    f32 = lambda *s, rng=rng: jnp.asarray(rng.normal(size=s), jnp.float32)
    floats = (
      f32(rows, *tokens),
      f32(rows, *tokens),
      f32(shape.ratio, *tokens[1:]),
    )
    args = floats, lasts, f32(*lasts[0].shape, shape.dim)
    # Several entries for each program, and as many programs as entries.
    for sms in (1, 132):
      with mock.patch.object(compat, 'num_sms', lambda sms=sms: sms):
        interpreted.compare(f'{name} on {sms}', compress_both, args, 1e-5)
  check_compress_large()


def check_compress_large():
  """A maximum that grows from step to step, and nan that no entry draws on."""
  shape = compress_shapes.TEST['long_and_overlapping']
  at, before = compress_shapes.places(shape)
  rng = np.random.default_rng(0)
  size = 1, sum(shape.documents[0]), shape.series, shape.dim
  kv, gate = rng.normal(size=size), np.round(4 * rng.normal(size=size)) / 4
  gate += 1e4 + np.arange(size[1])[:, None, None]
  bias = np.round(4 * rng.normal(size=(shape.ratio, *size[2:]))) / 4
  # The last tokens, and the first window, which is taken from both entries.
  kv[:, 80:] = gate[:, 80:] = np.nan
  kv[:, :20] = gate[:, :20] = np.nan
  at[0, 0] = before[0, 1] = -1
  grad = rng.normal(size=(*at.shape, shape.dim))
  kv, gate, bias, grad = (
    jnp.asarray(a, jnp.float32) for a in (kv, gate, bias, grad)
  )
  args = (kv, gate, bias), (at, before), grad
  interpreted.compare('large', compress_both, args, 1e-5)


def check_sparse_mla_parts():
  """Lists of every length around what is in flight, and numbers that are none.

  The sums are of float32, so this shows the order as well.
  """
  rng = np.random.default_rng(0)
  at = np.append(np.repeat(np.arange(6), [0, 1, 8, 9, 17, 0]), [-1] * 4)
  rng.shuffle(at)
  normal = lambda *size: rng.normal(size=size).astype(np.float32)
  totals, parts = (normal(6, 512), normal(6, 64)), normal(len(at), 640)
  parts = jnp.asarray(parts, jnp.bfloat16)

  def add(*args, impl):
    total_c, total_r, parts = args
    if impl == 'gpu':
      lists = latent_gradient._lists(jnp.asarray(at), 6)
      given = total_c, total_r, parts[:, :512], parts[:, 512:]
      return latent_gradient.add_parts(*given, *lists)
    totals = np.concatenate([total_c, total_r], axis=1)
    for i, row in zip(at, np.asarray(parts, np.float32)[:, :576]):
      totals[i] += row if i >= 0 else 0
    return totals[:, :512], totals[:, 512:]

  interpreted.compare('parts', add, (*totals, parts), 0.0)


if __name__ == '__main__':
  globals()['check_' + sys.argv[1]]()
