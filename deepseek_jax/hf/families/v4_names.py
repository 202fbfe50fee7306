"""Names the tensors of DeepSeek-V4 checkpoints, in both spellings.

The table has the original names ('layers.0.attn.wq_a.weight'). Names as
transformers holds them in memory ('model.layers.0.self_attn.q_a_proj.weight',
experts packed in one tensor), and the mixture that it writes, are translated
into original ones before anything looks them up.
"""

import re
from collections.abc import Iterator, Mapping

from deepseek_jax.errors import InputError
from deepseek_jax.hf.families.family import Names
from deepseek_jax.hf.rows import Row, swiglu
from deepseek_jax.hf.safetensors_io import Entry
from deepseek_jax.model.block import BlockConfig


def _connection(ours: str, theirs: str) -> tuple[Row, ...]:
  """Returns the rows of a hyper-connection."""
  return (
    Row(f'{ours}.fn', f'{theirs}_fn', 2, fp8=False),
    Row(f'{ours}.base', f'{theirs}_base'),
    Row(f'{ours}.scale', f'{theirs}_scale'),
  )


def _compressor(ours: str, theirs: str) -> tuple[Row, ...]:
  """Returns the rows of a compressor of entries."""
  return (
    Row(f'{ours}.kv', f'{theirs}.wkv.weight', 1, fp8=False),
    Row(f'{ours}.gate', f'{theirs}.wgate.weight', 1, fp8=False),
    Row(f'{ours}.bias', f'{theirs}.ape'),
    Row(f'{ours}.norm.scale', f'{theirs}.norm.weight'),
  )


_ROOT = (
  Row('embed', 'embed.weight'),
  Row('norm.scale', 'norm.weight'),
  Row('head', 'head.weight', 1, fp8=False),
  *_connection('residual', 'hc_head'),
)
_ATTENTION = (
  Row('attention.q_down', 'attn.wq_a.weight', 1),
  Row('attention.q_norm.scale', 'attn.q_norm.weight'),
  Row('attention.q_up', 'attn.wq_b.weight', 1),
  Row('attention.kv', 'attn.wkv.weight', 1),
  Row('attention.kv_norm.scale', 'attn.kv_norm.weight'),
  Row('attention.sinks', 'attn.attn_sink'),
  Row('attention.out_down', 'attn.wo_a.weight', 1),
  Row('attention.out_up', 'attn.wo_b.weight', 2),
)
_ENTRIES = _compressor('attention.far.compressor', 'attn.compressor')
_INDEXER = (
  Row('attention.far.indexer.q', 'attn.indexer.wq_b.weight', 1),
  Row(
    'attention.far.indexer.weights',
    'attn.indexer.weights_proj.weight',
    1,
    fp8=False,
  ),
  *_compressor('attention.far.indexer.compressor', 'attn.indexer.compressor'),
)
_BLOCK = (
  Row('attention_norm.scale', 'attn_norm.weight'),
  Row('ffn_norm.scale', 'ffn_norm.weight'),
  *_connection('attention_residual', 'hc_attn'),
  *_connection('ffn_residual', 'hc_ffn'),
)
_MOE = (
  Row('ffn.router.weight', 'ffn.gate.weight', 1, fp8=False),
  Row('ffn.router.bias', 'ffn.gate.bias'),
  Row('ffn.router.table', 'ffn.gate.tid2eid'),
  *swiglu('ffn.', 'ffn.experts.{e}.', 'w1', 'w3', 'w2'),
  *swiglu('ffn.shared.', 'ffn.shared_experts.', 'w1', 'w3', 'w2'),
)
_MTP = (
  Row('embed_norm.scale', 'enorm.weight'),
  Row('hidden_norm.scale', 'hnorm.weight'),
  Row('embed_proj', 'e_proj.weight', 1),
  Row('hidden_proj', 'h_proj.weight', 1),
  Row('norm.scale', 'norm.weight'),
  *_connection('residual', 'hc_head'),
)


def _block_rows(block: BlockConfig) -> tuple[Row, ...]:
  """Returns the table of one layer."""
  compress = block.attention.compress
  far = () if compress == 'none' else _ENTRIES
  far += _INDEXER if compress == 'csa' else ()
  return (*_BLOCK, *_ATTENTION, *far, *_MOE)


# From transformers' names to the original ones, in this order.
_RENAMES = tuple(
  (re.compile(pattern), to)
  for pattern, to in (
    (r'^model\.', ''),
    (r'^embed_tokens\.', 'embed.'),
    (r'^lm_head\.', 'head.'),
    (r'^hc_head\.hc_', 'hc_head_'),
    (r'\.self_attn\.', '.attn.'),
    (r'\.mlp\.', '.ffn.'),
    (r'\.input_layernorm\.', '.attn_norm.'),
    (r'\.post_attention_layernorm\.', '.ffn_norm.'),
    (r'\.(attn|ffn)_hc\.', r'.hc_\1_'),
    (r'\.attn\.sinks$', '.attn.attn_sink'),
    (r'\.attn\.norm\.', '.attn.kv_norm.'),  # as transformers 5.23 writes it
    (
      r'\.compressor\.indexer\.scorer\.weights_proj\.',
      '.indexer.weights_proj.',
    ),
    (r'\.compressor\.indexer\.q_b_proj\.', '.indexer.wq_b.'),
    (r'\.compressor\.indexer\.', '.indexer.compressor.'),
    (r'\.compressor\.kv_norm\.', '.compressor.norm.'),
    (r'\.position_bias$', '.ape'),
    (r'\.q_a_proj\.', '.wq_a.'),
    (r'\.q_a_norm\.', '.q_norm.'),
    (r'\.q_b_proj\.', '.wq_b.'),
    (r'\.o_a_proj\.', '.wo_a.'),
    (r'\.o_b_proj\.', '.wo_b.'),
    (r'\.e_score_correction_bias$', '.bias'),
    (r'\.shared_experts\.gate_proj\.', '.shared_experts.w1.'),
    (r'\.shared_experts\.up_proj\.', '.shared_experts.w3.'),
    (r'\.shared_experts\.down_proj\.', '.shared_experts.w2.'),
    (r'\.attn\.kv_proj\.', '.attn.wkv.'),
    (r'\.compressor\.kv_proj\.', '.compressor.wkv.'),
    (r'\.compressor\.gate_proj\.', '.compressor.wgate.'),
  )
)
_PACKED = re.compile(r'(.*\.ffn\.experts\.)(gate_up_proj|down_proj)$')
_SCALED = re.compile(r'(.*\.(?:w[123]|wq_[ab]|wkv|wo_[ab]|[eh]_proj))\.scale$')


def original(name: str) -> str:
  """Returns the original name of a tensor that transformers may have named."""
  for pattern, to in _RENAMES:
    name = pattern.sub(to, name)
  # The scales of quantised weights are named as in V3's files.
  return _SCALED.sub(r'\1.weight_scale_inv', name)


def normalized(entries: Mapping[str, Entry]) -> dict[str, Entry]:
  """Returns the tensors of a folder by original names, experts unpacked."""
  out: dict[str, Entry] = {}
  for name, entry in entries.items():
    for new, part in _unpacked(original(name), entry):
      if new in out:
        raise InputError(f'{entry.file}: {name!r} is there under two names')
      out[new] = part
  return out


def _unpacked(name: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
  """Yields the tensors of an entry: one per expert and half if packed."""
  match = _PACKED.fullmatch(name)
  if not match or len(entry.shape) != 3:
    yield name, entry
    return
  experts, rows, columns = entry.shape
  parts = ('w1', 'w3') if match[2] == 'gate_up_proj' else ('w2',)
  if rows % len(parts):
    raise InputError(
      f'{entry.file}: tensor {name!r} is {list(entry.shape)}: gate and up must'
      ' have as many rows'
    )
  # An expert's gate and then its up are contiguous: each is a slice.
  shape = (rows // len(parts), columns)
  size = shape[0] * columns * entry.dtype.itemsize
  start = entry.start
  for e in range(experts):
    for part in parts:
      one = Entry(entry.file, entry.dtype, shape, start)
      yield f'{match[1]}{e}.{part}.weight', one
      start += size


NAMES = Names(
  root=_ROOT,
  block=_block_rows,
  mtp=_MTP,
  layer='layers.{}.',
  mtp_layer='mtp.{}.',
  original=normalized,
)
