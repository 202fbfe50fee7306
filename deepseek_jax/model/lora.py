"""LoRA: chosen weights learn a low-rank product on top of frozen values.

W + (alpha / rank) a b (Hu et al., arXiv:2106.09685, section 4.1), where a is
drawn and b begins at zero, so that a fresh model is the base model. The dict
that holds a weight also holds {'lora': {its name: {'a': ..., 'b': ...}}}. The
product is folded into the weight before the model runs, so layers, meshes and
kernels know nothing of it.
Legend: L stacked layers, n inputs, m outputs, r rank.
"""

import dataclasses
import difflib
import functools
import math
import string
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import matrices
from deepseek_jax.model.matrices import RANK

KEY = 'lora'


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Says which weights learn a low-rank product, and how large it is.

  Attributes:
    names: dotted names; a matrix is adapted if one of them is a part of its
      own: 'attention' has all of 'segments.attention.q_up', 'attention.q_up'
      that one in every layer. Numbers of layers are no part of a name.
    rank: r, of every product.
    alpha: the product is scaled by alpha / rank.
  """

  names: tuple = ('attention',)
  rank: int = 8
  alpha: float = 16.0

  def __post_init__(self):
    at_least(self, 'lora.', rank=1)
    above(self, 'lora.', alpha=0)
    some = isinstance(self.names, tuple | list) and len(self.names) > 0
    if not some or not all(type(name) is str and name for name in self.names):
      raise InputError(
        f"lora.names = {self.names!r}: write names, ('attention', 'head')"
      )

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


class Adapter(NamedTuple):
  """How a weight's product is made.

  Attributes:
    a, b: shapes, [L ... n r] and [L ... r m], where n and m may be several
      axes and matrices that are independent keep theirs.
    axes: their logical axes.
    product: the einsum of a and b.
    fan_in: n.
  """

  a: tuple[int, ...]
  b: tuple[int, ...]
  axes: tuple[tuple, tuple]
  product: str
  fan_in: int


def adapter(shape: tuple, axes: tuple, rank: int) -> Adapter | None:
  """Returns the adapter of a weight with these axis names; None: no matrix.

  Args:
    shape: of the weight, stacked layers first.
    axes: names of its axes, without the stack.
    rank: r.
  """
  how = matrices.split(axes)
  if how is None:
    return None
  stack = len(shape) - len(axes)
  letters = string.ascii_lowercase[: len(shape)]
  lead = [(letters[i], shape[i], None) for i in range(stack)]
  each = list(zip(letters[stack:], shape[stack:], axes))
  thin = ('z', rank, RANK)
  a = [x for i, x in enumerate(each) if i not in how.outputs] + [thin]
  # r stands where the first input stood.
  b = [
    thin if i == how.inputs[0] else x
    for i, x in enumerate(each)
    if i not in how.inputs[1:]
  ]
  text = lambda dims: ''.join(letter for letter, *_ in lead + dims)
  sizes = lambda dims: tuple(size for _, size, _ in lead + dims)
  return Adapter(
    sizes(a),
    sizes(b),
    (tuple(x[2] for x in a), tuple(x[2] for x in b)),
    f'{text(a)},{text(b)}->{letters}',
    math.prod(each[i][1] for i in how.inputs),
  )


def adapters(params: Mapping, cfg: LoRAConfig) -> dict[tuple, Adapter]:
  """Returns the adapters of a model, or of a part of it, by weight.

  Args:
    params: abstract parameters.
    cfg: which and how large.
  """
  return {
    path: made
    for path, variable in _flat(params)
    if any(_inside(name, _words(path)) for name in cfg.names)
    and (made := _adapter_of(variable, cfg.rank))
  }


def check(params: Mapping, cfg: LoRAConfig) -> None:
  """Raises InputError where a name adapts nothing of a model.

  Args:
    params: abstract parameters of the whole model.
    cfg: whose names.
  """
  flat = {_words(path): variable for path, variable in _flat(params)}
  for name in cfg.names:
    found = [path for path in flat if _inside(name, path)]
    if not found:
      known = {'.'.join(run) for path in flat for run in _runs(path)}
      near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
      hint = (
        f'did you mean {near[0]!r}?'
        if near
        else 'use one of '
        + str(sorted({word for path in flat for word in path}))
      )
      raise InputError(f'lora.names: no parameter has {name!r} in it; {hint}')
    if not any(_adapter_of(flat[path], cfg.rank) for path in found):
      raise InputError(
        f'lora.names: {name!r} is {".".join(found[0])}, which is no matrix;'
        ' name one that is'
      )


def folded(params: Mapping, made: Mapping[tuple, Adapter], scale: float):
  """Returns parameters without adapters, their products added to the weights.

  A product is made and added in float32, then rounded to the weight's dtype.
  Parameters that hold no adapters stay as they are.

  Args:
    params: nested dicts of arrays.
    made: see `adapters`.
    scale: of the products.
  """
  return _folded(params, (), made, scale)


def plain(params: Mapping) -> dict:
  """Returns the parameters without their adapters, which are not folded in."""
  return {
    key: plain(value) if isinstance(value, Mapping) else value
    for key, value in params.items()
    if key != KEY
  }


def holds(params: Mapping) -> bool:
  """Whether any part of the parameters is an adapter."""
  return any(
    key == KEY or (isinstance(value, Mapping) and holds(value))
    for key, value in params.items()
  )


def adapted(base, cfg: LoRAConfig, first: tuple[int, ...] = ()):
  """Returns a module's pure functions with adapters among its parameters.

  Args:
    base: a `functional.Functional` without.
    cfg: which weights are adapted.
    first: of each segment, the number of the first layer that base.init makes;
      by default 0.
  """
  params = base.abstract['params']
  made = adapters(params, cfg)

  def variable(shape, axes):
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(value, axes=axes, full_precision=True)

  def declare(path):
    one = made[path]
    return {
      'a': variable(one.a, one.axes[0]),
      'b': variable(one.b, one.axes[1]),
    }

  abstract = type(params)(_grown(params, made, declare))

  def init(key):
    variables = base.init(key)
    draw = lambda path: _drawn(key, path, made[path], _start(path, first))
    return {**variables, 'params': _grown(variables['params'], made, draw)}

  def cast(variables):
    # Adapted weights stay float32, so that the sum is rounded once.
    given = variables['params']
    out = base.cast({**variables, 'params': plain(given)})
    return {**out, 'params': _exact(out['params'], given)}

  def ready(variables):
    params = folded(variables['params'], made, cfg.scale)
    return base.ready({**variables, 'params': params})

  merge = lambda variables: base.merge(ready(variables))
  return base._replace(
    abstract={**base.abstract, 'params': abstract},
    init=init,
    cast=cast,
    merge=merge,
    ready=ready,
  )


def _flat(params: Mapping) -> Iterator[tuple[tuple, nnx.Variable]]:
  leaf = lambda v: isinstance(v, nnx.Variable)
  for entries, variable in jax.tree.leaves_with_path(params, is_leaf=leaf):
    path = tuple(entry.key for entry in entries)
    if KEY not in path:
      yield path, variable


def _adapter_of(variable: nnx.Variable, rank: int) -> Adapter | None:
  axes = tuple(variable.get_metadata()['axes'])
  return adapter(tuple(variable.shape), axes, rank)


def _words(path: tuple) -> tuple[str, ...]:
  return tuple(key for key in path if isinstance(key, str))


def _runs(path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
  """Yields every run of a path's words."""
  for i in range(len(path)):
    for j in range(i + 1, len(path) + 1):
      yield path[i:j]


def _inside(name: str, path: tuple[str, ...]) -> bool:
  return tuple(name.split('.')) in _runs(path)


def _grown(params: Mapping, made, make, path: tuple = ()) -> dict:
  """Returns the tree with `make` of each adapted weight's path beside it."""
  out: dict[Any, Any] = {}
  thin = {}
  for key, value in params.items():
    at = (*path, key)
    inner = isinstance(value, Mapping)
    out[key] = _grown(value, made, make, at) if inner else value
    if at in made:
      thin[key] = make(at)
  return {**out, KEY: thin} if thin else out


def _start(path: tuple, first: tuple[int, ...]) -> int:
  stacked = path[0] == 'segments' and first
  return first[path[1]] if stacked else 0


def _drawn(key, path: tuple, one: Adapter, start: int) -> dict:
  """Returns a normal with variance 1 / n, and b = 0; each layer by itself.

  A layer's numbers depend on its place in the whole model alone, so that
  pipeline stages draw what the whole model does.
  """
  key = jax.random.fold_in(key, zlib.crc32('.'.join(map(str, path)).encode()))
  std = one.fan_in**-0.5
  if path[0] == 'segments':
    layers = start + jnp.arange(one.a[0])
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(layers)
    draw = lambda k: jax.random.normal(k, one.a[1:], jnp.float32)
    a = jax.vmap(draw)(keys)
  else:
    a = jax.random.normal(key, one.a, jnp.float32)
  return {'a': std * a, 'b': jnp.zeros(one.b, jnp.float32)}


def _exact(cast: Mapping, given: Mapping) -> dict:
  """Returns cast parameters with adapters, and what they adapt, as given."""
  out = {
    key: _exact(value, given[key]) if isinstance(value, Mapping) else value
    for key, value in cast.items()
  }
  thin = given.get(KEY, {})
  return {
    **out,
    **{key: given[key] for key in (*thin, *([KEY] if thin else []))},
  }


def _folded(params: Mapping, path: tuple, made, scale: float) -> dict:
  thin, out = params.get(KEY, {}), {}
  for key, value in params.items():
    if key == KEY:
      continue
    at = (*path, key)
    if isinstance(value, Mapping):
      value = _folded(value, at, made, scale)
    elif key in thin:
      value = _sum(
        value, thin[key]['a'], thin[key]['b'], made[at].product, scale
      )
    out[key] = value
  return out


@functools.partial(jax.jit, static_argnames=('product', 'scale'))
def _sum(w, a, b, product: str, scale: float):
  """Returns w + scale a b in w's dtype."""
  # Asked for outright: a GPU would multiply float32 as TF32.
  thin = jnp.einsum(
    product,
    a.astype(jnp.float32),
    b.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return (w.astype(jnp.float32) + scale * thin).astype(w.dtype)
