"""The whole model again in float64 NumPy, written from the papers with loops.

It shares no code with the library: it reads configurations and weights, and
every equation is spelt out for one sequence, one head or one token at a time.
"""

import math

import numpy as np


def rms(x, scale, eps):
  x = np.asarray(x, np.float64)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def frequencies(cfg, dim):
  """V2 section 3.1.4 (YaRN), the Llama 3.1 report, or plain rope."""
  base = [cfg.theta ** (-2 * i / dim) for i in range(dim // 2)]
  kind = type(cfg.scaling).__name__
  if kind == 'YarnConfig':
    y = cfg.scaling
    corr = lambda n: (
      dim * math.log(y.original_length / (2 * math.pi * n))
      / (2 * math.log(cfg.theta))
    )  # fmt: skip
    low = max(math.floor(corr(y.beta_fast)), 0)
    high = min(math.ceil(corr(y.beta_slow)), dim - 1)
    if low == high:
      high += 0.001
    out = []
    for i, f in enumerate(base):
      ramp = min(max((i - low) / (high - low), 0), 1)
      out.append(f * (1 - ramp) + f / y.factor * ramp)
    return np.array(out)
  if kind == 'Llama3Config':
    return np.array([_llama3(f, cfg.scaling) for f in base])
  if kind == 'LinearConfig':
    return np.array([f / cfg.scaling.factor for f in base])
  return np.array(base)


def _llama3(f, cfg):
  """By wavelength, as the released Llama code has it."""
  wavelength = 2 * math.pi / f
  longest = cfg.original_length / cfg.low_factor
  shortest = cfg.original_length / cfg.high_factor
  if wavelength < shortest:
    return f
  if wavelength > longest:
    return f / cfg.factor
  smooth = (cfg.original_length / wavelength - cfg.low_factor) / (
    cfg.high_factor - cfg.low_factor
  )
  return (1 - smooth) * f / cfg.factor + smooth * f


def rope(x, positions, cfg):
  """x [T ... R], positions [T]; each pair as one complex number."""
  R = x.shape[-1]
  freqs = frequencies(cfg, R)
  out = np.array(x, np.float64)
  for t, p in enumerate(positions):
    for i in range(R // 2):
      a, b = (2 * i, 2 * i + 1) if cfg.interleaved else (i, i + R // 2)
      rotated = (x[t, ..., a] + 1j * x[t, ..., b]) * np.exp(1j * p * freqs[i])
      out[t, ..., a], out[t, ..., b] = rotated.real, rotated.imag
  return out


def yarn_multiplier(cfg):
  if type(cfg.scaling).__name__ != 'YarnConfig':
    return 1.0
  m = 0.1 * cfg.scaling.mscale_all_dim * math.log(cfg.scaling.factor) + 1
  return m * m


def attend(q, k, v, scale, segments):
  """q [T H K], k [T G K], v [T G V] of one sequence -> [T H V]."""
  T, H, _ = q.shape
  share = H // k.shape[1]
  out = np.zeros((T, H, v.shape[-1]))
  for h in range(H):
    for t in range(T):
      seen = [s for s in range(t + 1) if segments[s] == segments[t]]
      scores = np.array([q[t, h] @ k[s, h // share] for s in seen]) * scale
      for weight, s in zip(softmax(scores), seen):
        out[t, h] += weight * v[s, h // share]
  return out


def mla(p, cfg, x, positions, segments):
  """One sequence x [T D] -> (y [T D], latent [T C], rotary key [T R])."""
  N, C = cfg.nope_dim, cfg.kv_rank
  latent = x
  if cfg.q_rank is not None:
    latent = rms(x @ p['q_down'], p['q_norm']['scale'], cfg.norm_eps)
  q = np.einsum('tq,qhk->thk', latent, p['q_up'])
  qr = rope(q[..., N:], positions, cfg.rope)
  a = x @ p['kv_down']
  c = rms(a[:, :C], p['kv_norm']['scale'], cfg.norm_eps)
  kr = rope(a[:, C:], positions, cfg.rope)
  kv = np.einsum('tc,chk->thk', c, p['kv_up'])
  shared = np.repeat(kr[:, None], cfg.heads, axis=1)
  q = np.concatenate([q[..., :N], qr], axis=-1)
  k = np.concatenate([kv[..., :N], shared], axis=-1)
  scale = (cfg.nope_dim + cfg.rope_dim) ** -0.5 * yarn_multiplier(cfg.rope)
  y = attend(q, k, kv[..., N:], scale, segments)
  return np.einsum('thv,hvd->td', y, p['out']), c, kr


def gqa(p, cfg, x, positions, segments):
  """One sequence x [T D] -> y [T D]."""
  q, k = (np.einsum('td,dhk->thk', x, p[name]) for name in 'qk')
  if cfg.qk_norm:
    q = rms(q, p['q_norm']['scale'], cfg.norm_eps)
    k = rms(k, p['k_norm']['scale'], cfg.norm_eps)
  q, k = (rope(a, positions, cfg.rope) for a in (q, k))
  v = np.einsum('td,dgk->tgk', x, p['v'])
  scale = cfg.head_dim**-0.5 * yarn_multiplier(cfg.rope)
  y = attend(q, k, v, scale, segments)
  return np.einsum('thk,hkd->td', y, p['out'])


def ffn(gate_up, down, x):
  return (silu(x @ gate_up[..., 0, :]) * (x @ gate_up[..., 1, :])) @ down


def scores_of(p, cfg, x):
  logits = np.asarray(x, np.float64) @ p['weight']
  if cfg.router.scoring == 'softmax':
    return softmax(logits)
  return 1 / (1 + np.exp(-logits))


def choose(s, bias, cfg):
  """One token's scores [E] -> chosen experts in order, their weights."""
  r, E = cfg.router, cfg.experts
  z = s + (0 if bias is None else bias)
  size = E // r.groups
  if r.groups > 1:
    groups = [z[g * size : (g + 1) * size] for g in range(r.groups)]
    best = {'max': max, 'top2': lambda g: sum(sorted(g)[-2:])}[r.group_score]
    ranked = sorted(range(r.groups), key=lambda g: (-best(groups[g]), g))
    allowed = ranked[: r.top_groups]
  else:
    allowed = [0]
  able = [e for e in range(E) if e // size in allowed]
  chosen = sorted(able, key=lambda e: (-z[e], e))[: cfg.top_k]
  weights = np.array([s[e] for e in chosen])
  if r.normalize:
    weights = weights / (weights.sum() + 1e-20)
  return chosen, weights * r.scale


def moe(p, bias, cfg, x, valid):
  """x [T D] -> (y [T D], load [E], chosen [T] lists, scores [T E])."""
  s = scores_of(p['router'], cfg, x)
  y, load, every = np.zeros(x.shape), np.zeros(cfg.experts, int), []
  for t in range(len(x)):
    chosen, weights = choose(s[t], bias, cfg) if valid[t] else ([], [])
    every.append(chosen)
    for e, w in zip(chosen, weights):
      y[t] += w * ffn(p['gate_up'][e], p['down'][e], x[t])
      load[e] += 1
    if cfg.shared:
      y[t] += ffn(p['shared']['gate_up'], p['shared']['down'], x[t])
  return y, load, every, s


def sequence_loss(s, top_k, valid):
  """V3 eq. 17-20 without alpha for one sequence of scores [T E]."""
  tokens = [t for t in range(len(s)) if valid[t]]
  E, T = s.shape[1], len(tokens)
  f, p = np.zeros(E), np.zeros(E)
  for t in tokens:
    for i in sorted(range(E), key=lambda e: (-s[t, e], e))[:top_k]:
      f[i] += E / (top_k * T)
    p += s[t] / s[t].sum() / T
  return float(f @ p)


def v2_losses(s, chosen, top_k, valid, devices, limit):
  """V2 eq. 23-31 without alphas for one sequence."""
  tokens = [t for t in range(len(s)) if valid[t]]
  E, T, size = s.shape[1], len(tokens), s.shape[1] // devices
  f, p, sent = np.zeros(E), np.zeros(E), np.zeros(devices)
  for t in tokens:
    for i in chosen[t]:
      f[i] += E / (top_k * T)
    for d in {i // size for i in chosen[t]}:
      sent[d] += devices / (limit * T)
    p += s[t] / T
  on = lambda a, d: a[d * size : (d + 1) * size]
  return {
    'expert': float(f @ p),
    'device': sum(on(f, d).mean() * on(p, d).sum() for d in range(devices)),
    'communication': sum(sent[d] * on(p, d).sum() for d in range(devices)),
  }


def balance_loss(cfg, s, chosen, valid):
  """Weighted balance losses of one sequence."""
  b = cfg.balance
  v2 = v2_losses(s, chosen, cfg.top_k, valid, b.devices, b.device_limit)
  total = sum(getattr(b, name) * value for name, value in v2.items())
  return total + b.sequence * sequence_loss(s, cfg.top_k, valid)


class Trace:
  """Loads and balance losses in the order in which MoE layers run."""

  def __init__(self):
    self.loads, self.balance = [], []


def block(p, buffers, cfg, x, positions, segments, trace):
  """One sequence x [T D] through one pre-norm block."""
  a = rms(x, p['attention_norm']['scale'], cfg.norm_eps)
  if hasattr(cfg.attention, 'kv_rank'):
    y = mla(p['attention'], cfg.attention, a, positions, segments)[0]
  else:
    y = gqa(p['attention'], cfg.attention, a, positions, segments)
  x = x + y
  a = rms(x, p['ffn_norm']['scale'], cfg.norm_eps)
  if not hasattr(cfg.ffn, 'experts'):
    return x + ffn(p['ffn']['gate_up'], p['ffn']['down'], a)
  bias = buffers.get('ffn', {}).get('router', {}).get('bias')
  valid = np.asarray(segments) > 0
  y, load, chosen, s = moe(p['ffn'], bias, cfg.ffn, a, valid)
  trace.loads.append(load)
  trace.balance.append(balance_loss(cfg.ffn, s, chosen, valid))
  return x + y


def _layer(tree, *path):
  for key in path[:-1]:
    tree = tree.get(key, {})
  pick = lambda t: (
    {k: pick(v) for k, v in t.items()} if isinstance(t, dict) else t[path[-1]]
  )
  return pick(tree)


def to_float64(tree):
  if isinstance(tree, dict):
    return {k: to_float64(v) for k, v in tree.items()}
  return np.asarray(tree, np.float64)


def forward(config, variables, tokens, positions, segments):
  """One sequence of tokens [T] -> (hidden [T D], MTP states, Trace)."""
  p, buffers = variables['params'], variables['buffers']
  x, trace = p['embed'][tokens], Trace()
  for i, segment in enumerate(config.segments()):
    for r in range(segment.repeat):
      for j, cfg in enumerate(segment.blocks):
        at = ('segments', i, j, r)
        layer, buffer = _layer(p, *at), _layer(buffers, *at)
        x = block(layer, buffer, cfg, x, positions, segments, trace)
  hidden = rms(x, p['norm']['scale'], config.norm_eps)
  states, h, T = [], hidden, len(tokens)
  cfg = config.block(config.mtp.block) if config.mtp.depth else None
  for k in range(1, config.mtp.depth + 1):
    m = p['mtp'][k - 1]
    b = buffers.get('mtp', {}).get(k - 1, {}).get('block', {})
    # i goes from 1 to T - k and stops at the end of its document.
    ahead = [
      i + k < T and segments[i + k] == segments[i] and segments[i] > 0
      for i in range(T)
    ]
    alive = [s if a else 0 for s, a in zip(segments, ahead)]
    e = np.stack([p['embed'][tokens[(i + k) % T]] for i in range(T)])
    e = rms(e, m['embed_norm']['scale'], config.norm_eps)
    h = rms(h, m['hidden_norm']['scale'], config.norm_eps)
    x = np.concatenate([e, h], axis=-1) @ m['merge']
    x = block(m['block'], b, cfg, x, positions, alive, trace)
    h = rms(x, m['norm']['scale'], config.norm_eps)
    states.append(h)
  return hidden, states, trace


def head(config, variables):
  p = variables['params']
  return p['embed'].T if config.tied else p['head']


def nll(logits, label):
  top = logits.max()
  return math.log(np.exp(logits - top).sum()) + top - logits[label]


def loss(config, variables, batch, mtp_weight, cross_document):
  """The training loss of a global batch: (total, parts, loads)."""
  variables = to_float64(variables)
  W = head(config, variables)
  D = config.mtp.depth
  main = mtp = balance = 0.0
  count, loads = 0, 0
  B, T = batch['tokens'].shape[0], batch['tokens'].shape[1] - 1
  for tokens, segments, positions in zip(
    batch['tokens'], batch['segments'], batch['positions']
  ):
    if cross_document:  # padding, which comes last, is no document
      segments, positions = np.minimum(segments, 1), np.arange(T + 1)
    hidden, states, trace = forward(
      config, variables, tokens[:T], positions[:T], segments[:T]
    )
    same = lambda i, k, s=segments: (
      i + k <= T and s[i] > 0 and all(s[i + j] == s[i] for j in range(k + 1))
    )
    for i in range(T):
      if same(i, 1):
        count += 1
        main += nll(hidden[i] @ W, tokens[i + 1])
      for k in range(1, D + 1):
        if same(i, k + 1):
          mtp += nll(states[k - 1][i] @ W, tokens[i + k + 1]) / D
    balance += sum(trace.balance) / B
    loads = loads + np.stack(trace.loads) if trace.loads else 0
  parts = {'loss': main / count, 'mtp_loss': mtp / count}
  parts['balance_loss'] = balance
  total = parts['loss'] + mtp_weight * parts['mtp_loss'] + balance
  return total, parts, loads
