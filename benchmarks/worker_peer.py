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
  elif task == 'serve':
    run = _serve(model.eval(), batch)
  elif task == 'serve_paged':
    model.set_attn_implementation('paged|sdpa')
    run = _serve_paged(model.eval())
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


def _serve(model, size):
  """Prompts in batches of like total length, padded on the left."""
  asked = sorted(contest.requests(), key=lambda r: (r[1], len(r[0])))
  batches = [asked[i : i + size] for i in range(0, len(asked), size)]

  @torch.no_grad()
  def run():
    for some in batches:
      most = max(len(prompt) for prompt, _ in some)
      ids = torch.zeros(len(some), most, dtype=torch.long)
      mask = torch.zeros_like(ids)
      for row, (prompt, _) in enumerate(some):
        ids[row, most - len(prompt) :] = torch.tensor(prompt)
        mask[row, most - len(prompt) :] = 1
      new = max(count for _, count in some)
      model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
      )

  return run


def _serve_paged(model):
  """transformers' own continuous batching; each prompt wants its own length."""
  asked = contest.requests()
  config = transformers.GenerationConfig(
    max_new_tokens=max(n for _, n in asked),
    do_sample=False,
    pad_token_id=0,
    eos_token_id=-1,
  )

  @torch.no_grad()
  def run():
    with model.continuous_batching_context_manager(config) as manager:
      for prompt, new in asked:
        manager.add_request(prompt, max_new_tokens=new)
      done = 0
      while done < len(asked):
        result = manager.get_result(timeout=60)
        if result is None:
          raise SystemExit('no result within a minute')
        if result.error:
          raise SystemExit(f'generate_batch: {result.error}')
        done += result.is_finished()

  return run


if __name__ == '__main__':
  contest.serve(make)
