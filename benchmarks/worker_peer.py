"""transformers' side of the contest, in the fastest way found for a CPU.

Experts by grouped_mm, attention by sdpa, fused AdamW.
"""

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from benchmarks import contest


def make(task, batch):
  torch.manual_seed(0)
  config = DeepseekV3Config(**contest.SHAPES)
  model = DeepseekV3ForCausalLM._from_config(config, attn_implementation='sdpa')
  model.set_experts_implementation('grouped_mm')
  draw = lambda length: torch.randint(0, config.vocab_size, (batch, length))
  if task == 'train':
    run = _train(model, draw(contest.LENGTH))
  elif task == 'prefill':
    run = _prefill(model.eval(), draw(contest.LENGTH))
  else:
    run = _decode(model.eval(), draw(contest.PROMPT))
  versions = {
    'torch': torch.__version__,
    'transformers': transformers.__version__,
  }
  return run, versions


def _train(model, tokens):
  optimizer = torch.optim.AdamW(
    model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.1, fused=True
  )

  def run():
    optimizer.zero_grad(set_to_none=True)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  return run


def _prefill(model, tokens):
  @torch.no_grad()
  def run():
    return model(tokens, use_cache=False).logits[0, 0, 0].item()

  return run


def _decode(model, prompt):
  @torch.no_grad()
  def run():
    return model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=contest.NEW,
      min_new_tokens=contest.NEW,
      do_sample=False,
      pad_token_id=0,
    )

  return run


if __name__ == '__main__':
  contest.serve(make)
