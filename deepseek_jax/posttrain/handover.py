"""Hands a run over to transformers, and compares what both answer."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.posttrain.measure import Sampler
from deepseek_jax.run import export
from deepseek_jax.run.folder import Loaded


def handed_over(
  folder: Path,
  loaded: Loaded,
  sampler: Sampler,
  prompts: Sequence[str],
  *,
  most: int,
) -> dict[str, Any]:
  """Writes a Hugging Face folder; returns whether transformers answers alike.

  Args:
    folder: to write.
    loaded: the run.
    sampler: of its model.
    prompts: that both answer greedily.
    most: tokens of an answer.

  Returns:
    'compared' and 'equal', numbers of answers, and 'examples'; where
    transformers or torch are not installed 0 compared and a 'note'.
  """
  export.write(loaded, str(folder), 'float32', None)
  missing = [
    name
    for name in ('torch', 'transformers')
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    return {
      'compared': 0,
      'equal': 0,
      'note': f'{" and ".join(missing)}: not installed, nothing was compared',
    }
  asked = [tuple(sampler.prompt(prompt)) for prompt in prompts]
  ours = sampler.answers(loaded.variables, prompts, 1, None)
  theirs = _theirs(folder, asked, loaded.tokenizer.eos_id, most)
  pairs = [(list(one.tokens), other) for [one], other in zip(ours, theirs)]
  decode = loaded.tokenizer.decode
  return {
    'compared': len(pairs),
    'equal': sum(a == b for a, b in pairs),
    'examples': [
      {'prompt': prompt, 'ours': decode(a), 'transformers': decode(b)}
      for prompt, (a, b) in list(zip(prompts, pairs))[:4]
    ],
  }


def _theirs(
  folder: Path, asked: Sequence[Sequence[int]], end: int, most: int
) -> list[list[int]]:
  """Returns transformers' greedy answers, token ids with the end token."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    str(folder), dtype=torch.float32, trust_remote_code=False
  ).eval()
  out = []
  for prompt in asked:
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
      made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=end,
        pad_token_id=end,
      )
    out.append(made[0, len(prompt) :].tolist())
  return out
