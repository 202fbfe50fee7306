"""Certifies that a checkpoint computes here what it does in transformers.

Both read the same folder, each with its own code, and see the same tokens in
float32 with eager attention. The logits are compared, also those that the head
makes of every layer's output, so a fault shows in the layer that has it. Of
equal scores both choose the lowest (see ties.py). Legend: B batch, T tokens, D
model, V vocabulary, L layers.
"""

import functools
import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.data import boundaries
from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.errors import InputError, install
from deepseek_jax.hf import loading, saving, ties, verify_text
from deepseek_jax.hf.source import Source
from deepseek_jax.model.block import Block, BlockConfig
from deepseek_jax.model.context import Context, context
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.transformer import build
from deepseek_jax.parallel.sharding import Buffer

LENGTHS = (1, 7, 64, 300)
MAX_LOGIT = 1e-4
MAX_KL = 1e-6

_TEXT = (
  'A mixture of experts keeps most of its parameters idle: a router sends each'
  ' token to a few of them, and the rest cost memory but no time.\n'
  'def route(scores, k):\n  best = sorted(range(len(scores)), key=lambda i:'
  ' -scores[i])\n  return best[:k]\n'
  'En 1905, trois articles ont changé la physique. 稀疏模型只计算需要的部分。'
  ' 3.14159 * 2**10 = 3216.99\n'
)


class Case(NamedTuple):
  """Holds the tokens of one comparison."""

  name: str
  ids: np.ndarray  # [B T]
  valid: np.ndarray  # [B T] bool, False on padding
  prompt: int | None = None  # tokens before cached decoding begins


class Compared(NamedTuple):
  """Holds what a case gives on one side."""

  logits: np.ndarray  # [B T V]
  layers: list[np.ndarray]  # per layer [B T V], empty when decoding
  tied: int = 0  # choices between equal scores, counted on transformers' side


def cases(
  folder: str,
  vocab_size: int,
  lengths: Sequence[int] = LENGTHS,
  *,
  left: bool = True,
) -> Iterator[Case]:
  """Yields random ids and real text of each length, padding, cached decoding.

  `left` has padding on the left too, which transformers can't take in every
  family.
  """
  text, _ = text_ids(folder, max(lengths), vocab_size)
  noise = np.random.default_rng(0).integers(0, vocab_size, text.shape)
  both = np.stack([noise, text]).astype(np.int32)
  for n in lengths:
    ids = both[:, :n]
    yield Case(f'{n} tokens', ids, np.ones(ids.shape, bool))
  n = min(30, max(lengths))
  sizes = np.array([n, n // 2, 1])[:, None]
  ids = both[[0, 1, 1], :n]
  at = np.arange(n)
  yield Case('padded right', ids, at < sizes)
  if left:
    yield Case('padded left', ids, at >= n - sizes)
  ids = both[:, : min(40, max(lengths))]
  valid = np.ones(ids.shape, bool)
  yield Case('cached decoding', ids, valid, prompt=ids.shape[1] // 2)


def text_ids(
  folder: str, length: int, vocab_size: int
) -> tuple[np.ndarray, str]:
  """Returns `length` token ids of real text [T], and what made them."""
  if os.path.exists(os.path.join(folder, 'tokenizer.json')):
    made = 'tokenizer.json'
    tokenizer = tokenizers.from_file(folder)
    around = boundaries.boundaries(folder, tokenizer).around
    ids = around(tokenizer.encode(_TEXT, special=True))
  else:
    made = 'bytes of UTF-8; the folder has no tokenizer.json'
    ids = list(_TEXT.encode())
  ids = np.resize(np.array(ids), length)
  return ids % vocab_size, made


class Ours:
  """Runs this library's side."""

  def __init__(self, folder: str) -> None:
    """Loads a folder in float32."""
    self.config, self.variables = loading.load(folder)
    self.model = build(self.config)
    self._apply = jax.jit(self.model.apply)
    self._head = jax.jit(self._lens)

  def _lens(self, stream: jax.Array) -> jax.Array:
    """Returns the head's logits [B T V] of a layer's output."""
    params = self.variables['params']
    norm = _pure(
      lambda rngs: RMSNorm(self.config.dim, eps=self.config.norm_eps, rngs=rngs)
    )
    head = _pure(
      lambda rngs: self.config.residual.head(
        self.config.dim, std=0.0, rngs=rngs
      ),
      lambda module, stream: module.collapse(stream),
    )
    x = head(params.get('residual', {}), {}, stream)
    x = norm({'scale': params['norm']['scale']}, {}, x)
    return x @ self.model.head(self.variables)

  def run(self, case: Case) -> Compared:
    """Returns logits of a case, and of every layer unless it decodes."""
    if case.prompt is not None:
      return Compared(self._decode(case), [])
    segments = jnp.asarray(case.valid, jnp.int32)
    out = self._apply(self.variables, case.ids, segment_ids=segments)
    layers = [np.asarray(self._head(x)) for x in self._streams(case, segments)]
    return Compared(np.asarray(out.logits), layers)

  def _streams(self, case: Case, segments: jax.Array) -> Iterator[jax.Array]:
    """Yields every layer's output, the residual streams."""
    stream = self.variables['params']['embed'][case.ids]
    stream = self.config.residual.expand(stream)
    ctx = context(jnp.asarray(case.ids), segments, self.config.vocab_size)
    for block, params, buffers in self._blocks():
      run = _block(block, self.config.dim)
      stream = run(params, buffers, stream, *ctx[:3])
      yield stream

  def _blocks(self) -> Iterator[tuple[BlockConfig, Any, Any]]:
    """Yields (configuration, params, buffers) of every layer, in order."""
    for layer in self.config.in_order():
      one = lambda a, r=layer.repeat: a[r]
      params = layer.of(self.variables['params'])
      buffers = layer.of(self.variables['buffers'], {})
      yield layer.block, jax.tree.map(one, params), jax.tree.map(one, buffers)

  def _decode(self, case: Case) -> np.ndarray:
    """Returns logits [B T V] of a prompt and of tokens decoded one by one."""
    out = self._apply(
      self.variables,
      case.ids[:, : case.prompt],
      cache=self.model.init_cache(*case.ids.shape),
    )
    every = [out.logits]
    for at in range(case.prompt, case.ids.shape[1]):
      token = case.ids[:, at : at + 1]
      out = self._apply(self.variables, token, cache=out.cache)
      every.append(out.logits)
    return np.concatenate(every, axis=1)


def _pure(
  make: Callable[[nnx.Rngs], nnx.Module],
  call: Callable = lambda module, *args: module(*args),
) -> Callable:
  """Returns `call` of a module as f(params, buffers, *arguments)."""
  built = jax.eval_shape(lambda key: make(nnx.Rngs(key)), jax.random.key(0))
  graphdef, _, _ = nnx.split(built, nnx.Param, Buffer)
  merge = lambda params, buffers: nnx.merge(graphdef, params, buffers)
  return lambda params, buffers, *args: call(merge(params, buffers), *args)


@functools.lru_cache(maxsize=16)
def _block(block: BlockConfig, dim: int) -> Callable:
  """Returns a jitted block: (params, buffers, stream, inputs) -> stream."""
  run = _pure(lambda rngs: Block(block, dim, std=0.0, rngs=rngs))

  def apply(
    params: Any,
    buffers: Any,
    stream: jax.Array,
    ids: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
  ) -> jax.Array:
    ctx = Context(ids, positions, segments)
    return run(params, buffers, stream, ctx)[0]

  return jax.jit(apply)


class Theirs:
  """Runs transformers' side."""

  def __init__(self, folder: str) -> None:
    """Loads a folder by transformers, in float32 with eager attention.

    Raises:
      InputError: torch or transformers is missing.
    """
    try:
      import torch
      import transformers
    except ImportError:
      raise InputError(
        f'torch and transformers are missing, {install("hf")}'
      ) from None
    self._torch = torch
    self.model = transformers.AutoModelForCausalLM.from_pretrained(
      folder,
      dtype=torch.float32,
      attn_implementation='eager',
      trust_remote_code=False,
    ).eval()
    self._new_cache = lambda: transformers.DynamicCache(
      config=self.model.config
    )

  def run(self, case: Case) -> Compared:
    """Returns what `Ours.run` does, with the number of tied choices."""
    with self._torch.no_grad(), ties.lowest_first() as seen:
      if case.prompt is not None:
        out = Compared(self._decode(case), [])
      else:
        out = self._forward(case)
    return out._replace(tied=seen['tied'])

  def ends(self) -> list[int]:
    """Returns the tokens that end what it generates."""
    found = self.model.generation_config.eos_token_id
    if found is None:
      return []
    return list(found) if isinstance(found, list | tuple) else [int(found)]

  def _forward(self, case: Case) -> Compared:
    """Returns logits, and the head's logits of every layer, by hooks."""
    torch, model, streams = self._torch, self.model, []
    # Hooks collect every layer's output for the head to read.
    hooks = [
      layer.register_forward_hook(lambda _, __, out: streams.append(out))
      for layer in model.model.layers
    ]
    # Positions count from the first token that is not padding.
    positions = np.maximum(np.cumsum(case.valid, axis=1) - 1, 0)
    out = model(
      torch.tensor(case.ids),
      attention_mask=torch.tensor(case.valid).long(),
      position_ids=torch.tensor(positions),
    )
    for hook in hooks:
      hook.remove()
    collapse = getattr(model.model, 'hc_head', lambda x: x)
    lens = lambda x: model.lm_head(model.model.norm(collapse(x))).numpy()
    return Compared(out.logits.numpy(), [lens(x) for x in streams])

  def _decode(self, case: Case) -> np.ndarray:
    """Returns logits [B T V] of a prompt and of tokens decoded one by one."""
    torch, every = self._torch, []
    past = self._new_cache()
    for start in (0, *range(case.prompt, case.ids.shape[1])):
      stop = start + 1 if start else case.prompt
      ids = torch.tensor(case.ids[:, start:stop])
      # By position: 5.24 gave the argument another name.
      out = self.model(ids, None, None, past, use_cache=True)
      every.append(out.logits.numpy())
    return np.concatenate(every, axis=1)


def difference(case: Case, ours: Compared, theirs: Compared) -> dict[str, Any]:
  """Returns the numbers of one case, over its tokens that are not padding.

  Returns:
    'max' and 'mean' of |difference|, 'kl' the largest KL(theirs, ours) of a
    token in nats, 'top1' the share of equal first choices, 'layers'.
  """
  a, b = ours.logits[case.valid], theirs.logits[case.valid]
  layers = [
    _gap(x[case.valid], y[case.valid])
    for x, y in zip(ours.layers, theirs.layers, strict=True)
  ]
  p, q = _log_softmax(b), _log_softmax(a)
  return {
    'case': case.name,
    'shape': list(case.ids.shape),
    'tokens': int(case.valid.sum()),
    **_gap(a, b),
    'kl': float((np.exp(p) * (p - q)).sum(axis=-1).max()),
    'top1': float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean()),
    'tied': theirs.tied,
    'layers': layers,
  }


def _gap(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """Returns largest and mean absolute difference, in float64."""
  gap = np.abs(a.astype(np.float64) - b)
  return {'max': float(gap.max()), 'mean': float(gap.mean())}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  """Returns float64 log probabilities of logits [... V]."""
  x = logits.astype(np.float64)
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def hashes(folder: str) -> dict[str, str]:
  """Returns the sha256 of every file that the certificate covers."""
  out = {}
  for name in sorted(os.listdir(folder)):
    if name.endswith(('.safetensors', '.json', '.jinja')):
      with open(os.path.join(folder, name), 'rb') as file:
        out[name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return out


def _readable(source: Source, temporary: str) -> str:
  """Returns a folder that transformers reads right.

  It can't dequantise matrices whose last block is ragged (it takes the block
  size from the number of blocks), so float8 is dequantised for it.
  """
  if not source.quantized:
    return source.folder
  target = saving.Format('float32')
  saving.write(temporary, source.config, source.read, target)
  return temporary


def certify(
  folder: str,
  *,
  max_logit: float = MAX_LOGIT,
  max_kl: float = MAX_KL,
  lengths: Sequence[int] = LENGTHS,
) -> dict[str, Any]:
  """Compares both implementations; the certificate is JSON.

  Args:
    folder: Hugging Face folder.
    max_logit: most that a logit may differ.
    max_kl: most KL(theirs, ours) of a token, in nats.
    lengths: of the prompts.

  Returns:
    'passed', 'folder', 'cases' (see `difference`), 'tokens' (see
    `verify_text.compare`), 'files' with their sha256, 'versions', 'limits',
    'dequantized_here': whether both sides saw weights that this library made of
    float8.
  """
  source, ours = Source(folder), Ours(folder)
  with tempfile.TemporaryDirectory() as temporary:
    theirs = Theirs(_readable(source, temporary))
  rows = [
    difference(case, ours.run(case), theirs.run(case))
    for case in cases(
      folder,
      ours.config.vocab_size,
      lengths,
      left=source.family.pads_left,
    )
  ]
  # NaN compares false: a certificate never passes on it.
  passed = all(r['max'] <= max_logit and r['kl'] <= max_kl for r in rows)
  words = verify_text.compare(folder, theirs.ends())
  passed = passed and words['passed']
  _, made = text_ids(folder, 1, ours.config.vocab_size)
  packages = ('jax', 'jaxlib', 'flax', 'torch', 'transformers', 'deepseek_jax')
  return {
    'passed': passed,
    'folder': os.path.realpath(folder),
    'limits': {'max': max_logit, 'kl': max_kl},
    'dtype': 'float32',
    'text': made,
    'tokens': words,
    'dequantized_here': source.quantized,
    'cases': rows,
    'files': hashes(folder),
    'versions': {p: importlib.metadata.version(p) for p in packages},
  }
