"""Names the tensors of DeepSeek-V4 checkpoints, in both spellings.

The table has the original names ('layers.0.attn.wq_a.weight'). Names as
transformers holds them in memory ('model.layers.0.self_attn.q_a_proj.weight',
experts packed in one tensor), and the mixture that it writes, are translated
into original ones before anything looks them up.
"""

import re
from collections.abc import Iterator, Mapping

from deepseek_jax.errors import InputError
from deepseek_jax.hf.row import Row
from deepseek_jax.hf.safetensors_io import Entry
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.transformer_config import TransformerConfig


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


def _swiglu(ours: str, theirs: str) -> tuple[Row, ...]:
  """Returns the rows of a SwiGLU: gate and up are halves of one array."""
  return (
    Row(f'{ours}gate_up', f'{theirs}w1.weight', 1, half=0),
    Row(f'{ours}gate_up', f'{theirs}w3.weight', 1, half=1),
    Row(f'{ours}down', f'{theirs}w2.weight', 1),
  )


ROOT = (
  Row('embed', 'embed.weight'),
  Row('norm.scale', 'norm.weight'),
  Row('head', 'head.weight', 1, fp8=False),
  *_connection('residual', 'hc_head'),
)
ATTENTION = (
  Row('attention.q_down', 'attn.wq_a.weight', 1),
  Row('attention.q_norm.scale', 'attn.q_norm.weight'),
  Row('attention.q_up', 'attn.wq_b.weight', 1),
  Row('attention.kv', 'attn.wkv.weight', 1),
  Row('attention.kv_norm.scale', 'attn.kv_norm.weight'),
  Row('attention.sinks', 'attn.attn_sink'),
  Row('attention.out_down', 'attn.wo_a.weight', 1),
  Row('attention.out_up', 'attn.wo_b.weight', 2),
)
ENTRIES = _compressor('attention.far.compressor', 'attn.compressor')
INDEXER = (
  Row('attention.far.indexer.q', 'attn.indexer.wq_b.weight', 1),
  Row(
    'attention.far.indexer.weights',
    'attn.indexer.weights_proj.weight',
    1,
    fp8=False,
  ),
  *_compressor('attention.far.indexer.compressor', 'attn.indexer.compressor'),
)
BLOCK = (
  Row('attention_norm.scale', 'attn_norm.weight'),
  Row('ffn_norm.scale', 'ffn_norm.weight'),
  *_connection('attention_residual', 'hc_attn'),
  *_connection('ffn_residual', 'hc_ffn'),
)
MOE = (
  Row('ffn.router.weight', 'ffn.gate.weight', 1, fp8=False),
  Row('ffn.router.bias', 'ffn.gate.bias'),
  Row('ffn.router.table', 'ffn.gate.tid2eid'),
  *_swiglu('ffn.', 'ffn.experts.{e}.'),
  *_swiglu('ffn.shared.', 'ffn.shared_experts.'),
)
MTP = (
  Row('embed_norm.scale', 'enorm.weight'),
  Row('hidden_norm.scale', 'hnorm.weight'),
  Row('embed_proj', 'e_proj.weight', 1),
  Row('hidden_proj', 'h_proj.weight', 1),
  Row('norm.scale', 'norm.weight'),
  *_connection('residual', 'hc_head'),
)


def is_v4(config: TransformerConfig) -> bool:
  """Returns whether files of this family hold a model."""
  return isinstance(config.attention, SharedKVConfig)


def block_rows(block: BlockConfig) -> tuple[Row, ...]:
  """Returns the table of one layer."""
  compress = block.attention.compress
  far = () if compress == 'none' else ENTRIES
  far += INDEXER if compress == 'csa' else ()
  return (*BLOCK, *ATTENTION, *far, *MOE)


def layer_prefix(index: int) -> str:
  """Returns the prefix of the tensors of layer `index`, counted from 0."""
  return f'layers.{index}.'


def mtp_prefix(depth: int) -> str:
  """Returns the prefix of a depth of multi-token prediction, counted from 0."""
  return f'mtp.{depth}.'


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
  # An expert's gate and then its up are contiguous: each is a slice.
  shape = (rows // len(parts), columns)
  size = shape[0] * columns * entry.dtype.itemsize
  start = entry.start
  for e in range(experts):
    for part in parts:
      one = Entry(entry.file, entry.dtype, shape, start)
      yield f'{match[1]}{e}.{part}.weight', one
      start += size
