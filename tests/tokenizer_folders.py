"""Tiny tokenizers in the manner of published ones, as folders."""

import json
import os

from tokenizers import (
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

TEXT = [
  'the quick brown fox jumps over the lazy dog; hello world, hello',
  'def f(x):\n  return x + 1\n' * 3,
  'En 1905, trois articles. 稀疏模型 😀😀',
]
SPECIAL = ['<s>', '</s>', '<pad>', '<|user|>', '<|assistant|>', '<|eot|>']
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' +"
  " m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
  "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
  '{% endif %}'
)
BOS = processors.TemplateProcessing(
  single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 0)]
)
BOTH = processors.TemplateProcessing(
  single='<s> $A </s>',
  pair='<s> $A </s> <s> $B </s>',
  special_tokens=[('<s>', 0), ('</s>', 1)],
)


def byte_level(post=None) -> Tokenizer:
  """DeepSeek's and Llama 3's kind: byte-level BPE."""
  out = Tokenizer(models.BPE())
  out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  out.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=SPECIAL,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  out.train_from_iterator(TEXT, trainer)
  if post is not None:
    out.post_processor = post
  return out


def sentencepiece(post=None) -> Tokenizer:
  """Llama 2's kind: ▁ for a blank, <0x..> for bytes of what is unknown."""
  pieces = [*SPECIAL, *(f'<0x{i:02X}>' for i in range(256))]
  letters = sorted(set('▁' + ''.join(TEXT[:2])) - {' ', '\n'})
  merges = [('▁', 'h'), ('l', 'o'), ('▁', 'x'), ('▁', '▁')]
  pieces += [*letters, *(a + b for a, b in merges)]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  out = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
  out.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  out.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  out.add_special_tokens(SPECIAL)
  if post is not None:
    out.post_processor = post
  return out


def save(folder, tokenizer, *, model_type='deepseek_v3', names=(), **files):
  """Writes a folder; `names` updates tokenizer_config.json."""
  about = {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'pad_token': '<pad>',
    'chat_template': TEMPLATE,
    **dict(names),
  }
  files = {
    'tokenizer_config': {k: v for k, v in about.items() if v is not None},
    'config': {'model_type': model_type},
    **files,
  }
  tokenizer.save(os.path.join(folder, 'tokenizer.json'))
  for name, value in files.items():
    with open(os.path.join(folder, f'{name}.json'), 'w') as file:
      json.dump(value, file)
  return folder
