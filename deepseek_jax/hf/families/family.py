"""Describes a family of Hugging Face checkpoints: all that tells it apart.

Reading, writing and certifying folders ask the record of their family; nothing
outside of `families` knows one by name.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.hf.config_fields import Field
from deepseek_jax.hf.config_limits import Range
from deepseek_jax.hf.rows import Row
from deepseek_jax.hf.safetensors_io import Entry
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.transformer_config import TransformerConfig

_NUMBER = r'(\d{1,9})'


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
  """Describes the tensors of a family.

  Attributes:
    root: those of no layer.
    block: returns those of a layer.
    mtp: those of a multi-token prediction layer, beside its block's.
    layer: the prefix of a layer, whose number stands for {}.
    mtp_layer: the same of a prediction layer; None where these follow the last
      layer of the model and count on.
    mtp_marks: names that only a prediction layer has, where its prefix does
      not say that it is one.
    mtp_copies: name in a prediction layer -> tensor that it repeats.
    original: renames the tensors of a folder to the names of the tables.
  """

  root: tuple[Row, ...]
  block: Callable[[BlockConfig], tuple[Row, ...]]
  mtp: tuple[Row, ...] = ()
  layer: str = 'model.layers.{}.'
  mtp_layer: str | None = None
  mtp_marks: tuple[str, ...] = ()
  mtp_copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  original: Callable[[Mapping[str, Entry]], dict[str, Entry]] = dict

  def layer_prefix(self, index: int) -> str:
    """Returns the prefix of the tensors of layer `index`, counted from 0."""
    return self.layer.format(index)

  def mtp_prefix(self, layers: int, depth: int) -> str:
    """Returns the prefix of a depth of multi-token prediction, from 0 on.

    Args:
      layers: of the model, without prediction.
      depth: which.
    """
    if self.mtp_layer is None:
      return self.layer_prefix(layers + depth)
    return self.mtp_layer.format(depth)

  def layer_of(self, name: str) -> int | None:
    """Returns the number of the layer that a tensor's prefix names."""
    return _number(self.layer, name)

  def mtp_of(self, layers: int, name: str) -> int | None:
    """Returns the depth of prediction that a prefix names, of any size."""
    if self.mtp_layer is not None:
      return _number(self.mtp_layer, name)
    layer = self.layer_of(name)
    return layer - layers if layer is not None and layer >= layers else None

  def root_name(self, ours: str) -> str:
    """Returns the tensor of the root that one of our arrays is."""
    return next(row.theirs for row in self.root if row.ours == ours)


def _number(prefix: str, name: str) -> int | None:
  """Returns what stands for {} where a name begins with a prefix."""
  before, after = map(re.escape, prefix.split('{}'))
  found = re.match(f'{before}{_NUMBER}{after}', name)
  return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Drafter:
  """Describes a speculative drafter in place of multi-token prediction.

  It is not read, but named.

  Attributes:
    name: what it is called.
    fields: prefix of its fields of config.json.
    tensors: parts of names that only its tensors have.
  """

  name: str
  fields: str
  tensors: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """Describes a family.

  Attributes:
    model_type: in config.json.
    architecture: the class that serves it.
    about: what it holds, in a few words.
    fits: returns whether a model is written as this family. `render` says
      what of such a model its files can't express.
    mapped: field of config.json -> field of ours.
    special: fields that `parse` reads.
    fixed: fields that may hold these values only.
    carried: fields that change no number and are written again.
    limits: ranges of numbers that no other family has.
    parse: returns further values of ours by dotted path. It takes the fields,
      whose names and limits are checked, and the values of `mapped`.
    render: returns the fields that are not in `mapped`; InputError names what
      of a model they cannot express.
    names: its tensors.
    aliases: other model types that mean the same; never written.
    exact: files keep all that is float32 here in float32; else biases alone.
    pads_left: transformers takes padding on the left.
    drafter: what some of its folders have, or None.
  """

  model_type: str
  architecture: str
  about: str
  fits: Callable[[TransformerConfig], bool]
  mapped: Mapping[str, Field]
  special: frozenset[str]
  fixed: Mapping[str, tuple]
  parse: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
  render: Callable[[TransformerConfig], dict[str, Any]]
  names: Names
  carried: frozenset[str] = frozenset()
  limits: Mapping[str, Range] = dataclasses.field(default_factory=dict)
  aliases: tuple[str, ...] = ()
  exact: bool = False
  pads_left: bool = True
  drafter: Drafter | None = None
