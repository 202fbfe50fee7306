"""Trains a byte-level BPE on the corpus (Sennrich et al., arXiv:1508.07909).

Any text can be encoded, for the 256 bytes are tokens; what is learned is which
neighbours to merge. Merges never cross the borders that `_WORDS` draws.
"""

from collections.abc import Iterable

from deepseek_jax.data.tokenizer import EOS, PAD, SPECIAL, Tokenizer
from deepseek_jax.errors import InputError

# Words with one leading sign or space; digits in threes; signs with the line
# ends after them; blank lines; runs of spaces, so an indentation is one token.
# English contractions have no branch of their own: it would cut 'self' in two.
_WORDS = (
  r'[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+'
  r'|\p{N}{1,3}'
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*'
  r'|\s*[\r\n]+'
  r'|\s+(?!\S)'
  r'|\s+'
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Returns a byte-level BPE of exactly `vocab_size` tokens, set by the texts.

  Raises InputError if the vocabulary can't hold the 256 bytes and the special
  tokens, or if the texts are too few to fill it.
  """
  from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
  from tokenizers import Tokenizer as Model

  least = len(SPECIAL) + 256
  if vocab_size < least:
    raise InputError(
      f'data.vocab_size={vocab_size}: a byte-level BPE needs at least {least}'
    )
  model = Model(models.BPE())
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_WORDS), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  if model.get_vocab_size() != vocab_size:
    raise InputError(
      f'data.vocab_size={vocab_size}: the corpus gives only '
      f'{model.get_vocab_size()} tokens; set it to that or add text'
    )
  return Tokenizer(model.to_str(), eos=EOS, pad=PAD)
