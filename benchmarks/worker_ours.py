"""This library's side of the contest."""

import time

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as ds
import deepseek_jax.cli.common
from benchmarks import contest
from deepseek_jax.infer import sampling as sample
from deepseek_jax.infer.engine import Engine
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.parallel import processor
from deepseek_jax.train import schedules
from deepseek_jax.train import step as train


def config() -> ds.TransformerConfig:
  """contest.SHAPES in our words; each layer apart, the fastest on a CPU."""
  S = contest.SHAPES
  return ds.TransformerConfig(
    vocab_size=S['vocab_size'],
    dim=S['hidden_size'],
    layout=((('dense', *['moe'] * (S['num_hidden_layers'] - 1)), 1),),
    attention=MLAConfig(
      heads=S['num_attention_heads'],
      q_rank=S['q_lora_rank'],
      kv_rank=S['kv_lora_rank'],
      nope_dim=S['qk_nope_head_dim'],
      rope_dim=S['qk_rope_head_dim'],
      v_dim=S['v_head_dim'],
    ),
    ffn=FFNConfig(S['intermediate_size']),
    moe=MoEConfig(
      experts=S['n_routed_experts'],
      top_k=S['num_experts_per_tok'],
      width=S['moe_intermediate_size'],
      shared=S['n_shared_experts'],
      router=RouterConfig(
        groups=S['n_group'],
        top_groups=S['topk_group'],
        scale=S['routed_scaling_factor'],
      ),
    ),
    init_std=S['initializer_range'],
  )


def make(task, batch):
  model = ds.build(config())
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(0, model.config.vocab_size, shape)
  tokens = jnp.asarray(draw(batch, contest.LENGTH + 1), jnp.int32)
  draws = jax.jit(model.init, compiler_options=processor.options('init'))
  variables = draws(jax.random.key(0))
  if task == 'train':
    run = _train(model, variables, tokens)
  elif task == 'prefill':
    forward = jax.jit(
      lambda v, t: model.apply(v, t).logits,
      compiler_options=processor.options('prefill'),
    )
    run = lambda: forward(variables, tokens[:, :-1]).block_until_ready()
  elif task == 'serve':
    run = _serve(model, variables, batch)
  else:
    variables = sample.prepare(model, variables, donate=True)
    prompt = draw(batch, contest.PROMPT)
    run = lambda: sample.sample(
      model,
      variables,
      prompt,
      sample.SampleConfig(temperature=0),
      max_new_tokens=contest.NEW,
    )
  return run, {'jax': jax.__version__}


def _train(model, variables, tokens):
  cfg = train.TrainConfig(
    tokens=1e9,
    batch=schedules.BatchConfig(tokens.shape[0]),
    schedule=schedules.ScheduleConfig('constant', peak=1e-4, warmup=0),
  )
  batch = {'tokens': tokens}  # each row one document, as the peer reads it
  state = [train.initial_state(model, cfg, variables)]
  step = jax.jit(
    train.train_step(model, cfg),
    donate_argnums=0,
    compiler_options=processor.options('train'),
  )

  def run():
    state[0], metrics = step(state[0], batch)
    return float(metrics['loss'])

  return run


def _serve(model, variables, slots):
  cfg = EngineConfig(
    slots=slots,
    context=768,
    page=64,
    prefills=8,
    chunks=((1, 64), (4, 128), (1, 256), (2, 256), (1, 512)),
    steps=16,
    rows=(4, slots),
    contexts=(256, 512, 768),
    reuse=False,
  )
  engine = Engine(model, variables, cfg, donate=True)
  engine.warm_up()
  greedy = Sampling(temperature=0)
  asked = [Request(tuple(p), n, greedy) for p, n in contest.requests()]

  def run():
    begun = time.perf_counter()
    for request in asked:
      engine.submit(request)
    first, last, gaps = {}, {}, []
    while engine.busy():
      for event in engine.step():
        now = time.perf_counter() - begun
        if event.request in last:
          gaps.append(now - last[event.request])
        first.setdefault(event.request, now)
        last[event.request] = now
    at = lambda values, q: float(np.quantile(list(values), q))
    return {
      'first_p50': at(first.values(), 0.5),
      'first_p99': at(first.values(), 0.99),
      'gap_p50': at(gaps, 0.5),
      'gap_p99': at(gaps, 0.99),
    }

  return run


if __name__ == '__main__':
  contest.serve(make)
