"""Defines a line of a name table, and the lines that several families share.

Every tensor of a file is one slice of one of our arrays: a layer of a stack,
an expert of its slab, the gate or the up half. So one table serves both
directions, loading and saving; `names` applies it.
"""

from typing import NamedTuple


class Row(NamedTuple):
  """Maps a tensor of a file to a part of one of our arrays.

  Attributes:
    ours: path below the block (or the root), with dots.
    theirs: name below the layer; '{e}' runs over the leading experts axis.
    inputs: how many axes of ours are the inputs of a matmul. Theirs is then
      [outputs, inputs] with each group of axes merged; 0: theirs is as ours.
    half: which entry of the axis after the inputs (gate 0, up 1), or None.
    fp8: the family stores it quantised.
  """

  ours: str
  theirs: str
  inputs: int = 0
  half: int | None = None
  fp8: bool = True


def swiglu(
  ours: str, theirs: str, gate: str, up: str, down: str
) -> tuple[Row, ...]:
  """Returns the rows of a SwiGLU: gate and up are halves of one array.

  Args:
    ours, theirs: prefixes of the names.
    gate, up, down: what follows in the file.
  """
  return (
    Row(f'{ours}gate_up', f'{theirs}{gate}.weight', 1, half=0),
    Row(f'{ours}gate_up', f'{theirs}{up}.weight', 1, half=1),
    Row(f'{ours}down', f'{theirs}{down}.weight', 1),
  )


def projections(ours: str, theirs: str) -> tuple[Row, ...]:
  """Returns the rows of a SwiGLU by the names of transformers."""
  return swiglu(ours, theirs, 'gate_proj', 'up_proj', 'down_proj')


ROOT = (
  Row('embed', 'model.embed_tokens.weight'),
  Row('norm.scale', 'model.norm.weight'),
  Row('head', 'lm_head.weight', 1, fp8=False),
)
NORMS = (
  Row('attention_norm.scale', 'input_layernorm.weight'),
  Row('ffn_norm.scale', 'post_attention_layernorm.weight'),
)
GQA = (
  Row('attention.q', 'self_attn.q_proj.weight', 1),
  Row('attention.k', 'self_attn.k_proj.weight', 1),
  Row('attention.v', 'self_attn.v_proj.weight', 1),
  Row('attention.out', 'self_attn.o_proj.weight', 2),
)
QK_NORMS = (
  Row('attention.q_norm.scale', 'self_attn.q_norm.weight'),
  Row('attention.k_norm.scale', 'self_attn.k_norm.weight'),
)
DENSE = projections('ffn.', 'mlp.')
# The router and the experts that a token chooses among.
ROUTED = (
  Row('ffn.router.weight', 'mlp.gate.weight', 1, fp8=False),
  *projections('ffn.', 'mlp.experts.{e}.'),
)
