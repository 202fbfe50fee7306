"""Turns text files into documents, stored tokens, seeded resumable batches."""

from deepseek_jax.data.baselines import bits_to_beat
from deepseek_jax.data.batches import Batches, blank, dataset, segment
from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.corpus import (
  Document,
  corpus_sha256,
  documents,
  is_held_out,
)
from deepseek_jax.data.heldout import (
  Heldout,
  uniform_bits_per_byte,
  xz_bits_per_byte,
)
from deepseek_jax.data.infill import fim
from deepseek_jax.data.token_store import HeldoutDocument, TokenStore
from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer, from_file
from deepseek_jax.data.windows import build
