"""V4's attention in float64 NumPy: one sequence, one query, one head at a time.

It shares no code with the library; `p` are a layer's weights.
"""

import numpy as np

from tests import reference


def tail(x, positions, rope, dim):
  """The last `dim` channels of x [T ... C] rotated."""
  rotated = reference.rope(x[..., -dim:], positions, rope)
  return np.concatenate([x[..., :-dim], rotated], axis=-1)


def compress(p, x, *, ratio, overlap, rope, rope_dim, eps):
  """x [T D] -> entries [T // ratio, C]."""
  J, C = p['kv'].shape[1:]
  kv = np.einsum('td,djc->tjc', x, p['kv'])
  gate = np.einsum('td,djc->tjc', x, p['gate'])
  bias = p['bias'].reshape(ratio, J, C)
  out = []
  for w in range(len(x) // ratio):
    values, logits = [], []
    for j in range(ratio):
      t = ratio * w + j
      if overlap and w:
        values.append(kv[t - ratio, 0])
        logits.append(gate[t - ratio, 0] + bias[j, 0])
      values.append(kv[t, J - 1])
      logits.append(gate[t, J - 1] + bias[j, J - 1])
    logits, entry = np.array(logits), np.zeros(C)
    for c in range(C):
      entry[c] = reference.softmax(logits[:, c]) @ np.array(values)[:, c]
    entry = reference.rms(entry, p['norm']['scale'], eps)
    out.append(tail(entry[None], [ratio * w], rope, rope_dim)[0])
  return np.array(out).reshape(-1, C)


def index_scores(p, cfg, x, latent):
  """I [T, entries] of the indexer's weights p."""
  turn = {'rope': cfg.compress_rope, 'rope_dim': cfg.rope_dim}
  keys = compress(
    p['compressor'], x, ratio=cfg.csa.ratio, overlap=True, eps=cfg.norm_eps,
    **turn,
  )  # fmt: skip
  q = np.einsum('tq,qji->tji', latent, p['q'])
  q = tail(q, range(len(x)), cfg.compress_rope, cfg.rope_dim)
  weight = x @ p['weights'] * (q.shape[1] * q.shape[2]) ** -0.5
  scores = np.zeros((len(x), len(keys)))
  for t in range(len(x)):
    for s in range(len(keys)):
      for j in range(q.shape[1]):
        scores[t, s] += weight[t, j] * max(q[t, j] @ keys[s], 0)
  return scores


def layer(p, cfg, x):
  """One document x [T D] -> (y [T D], facts of each token that sees an entry).

  The facts are the indexer's loss and the recall of its choice.
  """
  T, C = len(x), cfg.head_dim
  rope = cfg.rope if cfg.compress == 'none' else cfg.compress_rope
  at = range(T)
  latent = reference.rms(x @ p['q_down'], p['q_norm']['scale'], cfg.norm_eps)
  q = np.einsum('tq,qhc->thc', latent, p['q_up'])
  q = tail(reference.rms(q, 1.0, cfg.norm_eps), at, rope, cfg.rope_dim)
  kv = reference.rms(x @ p['kv'], p['kv_norm']['scale'], cfg.norm_eps)
  kv = tail(kv, at, rope, cfg.rope_dim)
  entries, scores, ratio = np.zeros((0, C)), None, 1
  if cfg.compress != 'none':
    csa = cfg.compress == 'csa'
    ratio = cfg.csa.ratio if csa else cfg.hca.ratio
    entries = compress(
      p['far']['compressor'], x, ratio=ratio, overlap=csa, rope=rope,
      rope_dim=cfg.rope_dim, eps=cfg.norm_eps,
    )  # fmt: skip
    if csa:
      scores = index_scores(p['far']['indexer'], cfg, x, latent)
  y, facts = np.zeros((T, cfg.heads, C)), {'loss': [], 'recall': []}
  for t in at:
    chosen = range(min((t + 1) // ratio, len(entries)))
    if scores is not None:
      seen = chosen
      best = sorted(seen, key=lambda s: (-scores[t, s], s))[: cfg.csa.top_k]
      chosen = best if cfg.csa.stage == 'sparse' else list(seen)
    near = [kv[s] for s in range(max(0, t - cfg.window + 1), t + 1)]
    keys = np.array(near + [entries[s] for s in chosen])
    shares = np.zeros(len(chosen))
    for h in range(cfg.heads):
      z = keys @ q[t, h] * C**-0.5
      weights = reference.softmax(np.append(z, p['sinks'][h]))[:-1]
      y[t, h] = weights @ keys
      shares += weights[len(near) :]
    if scores is not None and len(chosen):
      shares /= shares.sum()
      log_q = np.log(reference.softmax(scores[t, chosen]))
      facts['loss'].append((shares * (np.log(shares) - log_q)).sum())
      everywhere = np.zeros(len(seen))
      keys = np.array(near + [entries[s] for s in seen])
      for h in range(cfg.heads):
        z = np.append(keys @ q[t, h] * C**-0.5, p['sinks'][h])
        everywhere += reference.softmax(z)[len(near) : -1]
      facts['recall'].append(everywhere[best].sum() / everywhere.sum())
  y = tail(y, [-t for t in at], rope, cfg.rope_dim)
  y = y.reshape(T, cfg.groups, -1)
  y = np.einsum('tgk,kgo->tgo', y, p['out_down'])
  return np.einsum('tgo,god->td', y, p['out_up']), facts
