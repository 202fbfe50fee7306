"""Sparse attentions again in float64 NumPy, one query and one head at a time.

It shares no code with the library.
"""

import dataclasses

import numpy as np

from tests.reference import rms, rope, softmax, yarn_multiplier


def layer_norm(x, p, eps):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
  return centred / deviation * p['scale'] + p['bias']


def rotated_first(x, positions, R, cfg):
  """Rope on the first R channels of x [T ... I]."""
  return np.concatenate([rope(x[..., :R], positions, cfg), x[..., R:]], -1)


def index_scores(p, cfg, x, latent, positions):
  """Scores of one sequence's keys.

  Args:
    p, cfg: the indexer's weights, and the layer's configuration.
    x, latent, positions: the sequence [T D], [T Q], [T].

  Returns:
    I[t, s] for every t and s, a function of (t, keys) that gives I[t] for
    other keys [n I], and the index keys [T I].
  """
  ix, R = cfg.indexer, cfg.rope_dim
  how = dataclasses.replace(cfg.rope, interleaved=ix.interleaved)
  q = rotated_first(np.einsum('tq,qji->tji', latent, p['q']), positions, R, how)
  k = layer_norm(x @ p['k'], p['k_norm'], ix.norm_eps)
  k = rotated_first(k, positions, R, how)
  w = x @ p['weights'] / np.sqrt(ix.heads) / np.sqrt(ix.dim)

  def of(t, keys):
    out = np.zeros(len(keys))
    for s in range(len(keys)):
      for j in range(ix.heads):
        out[s] += w[t, j] * max(0.0, q[t, j] @ keys[s])
    return out

  return np.stack([of(t, k) for t in range(len(x))]), of, k


def in_blocks(cfg, t, seen, k, of):
  """Returns what query t may choose from, of the places `seen` (HISA).

  Args:
    cfg: size and count of blocks.
    t: the query, the last of `seen`.
    seen: the places of its document so far.
    k: index keys [T I].
    of: (t, keys) -> scores.
  """
  blocks = [seen[i : i + cfg.size] for i in range(0, len(seen), cfg.size)]
  first, own, between = blocks[0], blocks[-1], blocks[1:-1]
  scores = of(t, [k[block].mean(0) for block in between])
  order = sorted(range(len(between)), key=lambda b: (-scores[b], b))
  best = [between[b] for b in order[: cfg.count - 2]]
  return sorted({s for block in (first, own, *best) for s in block})


def ranked(scores, seen):
  """Visible places, best first, the lower place first among equals."""
  return sorted(seen, key=lambda s: (-scores[s], s))


def visible(t, segments):
  return [s for s in range(t + 1) if segments[s] == segments[t]]


def kl(p, logits):
  q = softmax(np.asarray(logits))
  return sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0)


def dsa(p, cfg, x, positions, segments, chosen=None):
  """One sequence x [T D].

  Args:
    p, cfg: weights of the layer and its configuration.
    x, positions, segments: the sequence.
    chosen: what each query reads; None: what the indexer picks.

  Returns:
    y [T D], chosen, per token the loss of either stage ('dense', 'sparse') and
    the recall of the dense attention.
  """
  N, C, H, T = cfg.nope_dim, cfg.kv_rank, cfg.heads, len(x)
  latent = x
  if cfg.q_rank is not None:
    latent = rms(x @ p['q_down'], p['q_norm']['scale'], cfg.norm_eps)
  q = np.einsum('tq,qhk->thk', latent, p['q_up'])
  q = np.concatenate([q[..., :N], rope(q[..., N:], positions, cfg.rope)], -1)
  a = x @ p['kv_down']
  c = rms(a[:, :C], p['kv_norm']['scale'], cfg.norm_eps)
  kr = rope(a[:, C:], positions, cfg.rope)
  kv = np.einsum('tc,chk->thk', c, p['kv_up'])
  scale = (N + cfg.rope_dim) ** -0.5 * yarn_multiplier(cfg.rope)
  scores, of, index = index_scores(p['indexer'], cfg, x, latent, positions)

  def weights(t, h, keys):
    keys = [np.concatenate([kv[s, h, :N], kr[s]]) @ q[t, h] for s in keys]
    return softmax(np.array(keys) * scale)

  y, picked = np.zeros((T, H, cfg.v_dim)), []
  facts = {'dense': [], 'sparse': [], 'recall': []}
  for t in range(T):
    seen = visible(t, segments)
    near, blocks = seen, cfg.indexer.blocks
    if blocks:
      near = in_blocks(blocks, t, seen, index, of)
    best = ranked(scores[t], near)[: cfg.top_k] if chosen is None else chosen[t]
    picked.append(best)
    for h in range(H):
      for w, s in zip(weights(t, h, best), best):
        y[t, h] += w * kv[s, h, N:]
    mean = lambda keys, t=t: sum(weights(t, h, keys) for h in range(H)) / H
    everywhere = dict(zip(seen, mean(seen)))
    facts['dense'].append(kl(everywhere.values(), scores[t, seen]))
    facts['sparse'].append(kl(mean(best), scores[t, best]))
    facts['recall'].append(sum(everywhere[s] for s in best))
  facts = {k: np.array(v) for k, v in facts.items()}
  return np.einsum('thv,hvd->td', y, p['out']), picked, facts


def compressed(p, block):
  """One compressing MLP on one group's block [l K]."""
  hidden = np.einsum('lk,lkf->f', block + p['place'], p['up'])
  return (hidden / (1 + np.exp(-hidden))) @ p['down']


def nsa(p, cfg, x, positions, segments, chosen=None):
  """One sequence x [T D] -> (y [T D], chosen blocks by query and group).

  Every document is worked through as if it were alone.
  """
  T, H, G = len(x), cfg.heads, cfg.kv_heads
  l, d, wide = cfg.block, cfg.stride, cfg.select_block
  q = rope(np.einsum('td,dhk->thk', x, p['q']), positions, cfg.rope)
  k = rope(np.einsum('td,dcgk->tcgk', x, p['k']), positions, cfg.rope)
  v = np.einsum('td,dcgk->tcgk', x, p['v'])
  gates = 1 / (1 + np.exp(-np.einsum('td,dhc->thc', x, p['gate'])))
  scale = cfg.qk_dim**-0.5 * yarn_multiplier(cfg.rope)
  y, picked = np.zeros((T, H, cfg.v_dim)), [[None] * G for _ in range(T)]

  def attention(query, keys, values):
    w = softmax(np.array([query @ key for key in keys]) * scale)
    return w, sum(a * b for a, b in zip(w, values))

  for t in range(T):
    doc = [s for s in range(T) if segments[s] == segments[t]]
    at = doc.index(t)  # the query's place in its document
    entries = [i for i in range(len(doc)) if i * d + l <= at + 1]
    tokens = lambda i, doc=doc: doc[i * d : i * d + l]
    for g in range(G):
      heads = range(g * H // G, (g + 1) * H // G)
      ck = [compressed(p['compress_k'], k[tokens(i), 0, g]) for i in entries]
      cv = [compressed(p['compress_v'], v[tokens(i), 0, g]) for i in entries]
      scores = [0.0] * (at // wide + 1)
      for h in heads:
        if entries:
          w, out = attention(q[t, h], ck, cv)
          y[t, h] += gates[t, h, 0] * out
          for a, i in zip(w, entries):
            for s in range(i * d, i * d + l, d):  # a stride at a time
              scores[min(s // wide, len(scores) - 1)] += a
      if chosen is None:
        own = len(scores) - 1
        always = [
          j for j in range(own + 1) if j < cfg.initial or j > own - cfg.local
        ]
        rest = [j for j in range(own + 1) if j not in always]
        rest = sorted(rest, key=lambda j: (-scores[j], j))
        blocks = sorted((always + rest)[: cfg.select])
      else:
        blocks = chosen[t][g]
      picked[t][g] = blocks
      far = [s for j in blocks for s in doc[j * wide : (j + 1) * wide]]
      far = [s for s in far if s <= t]
      near = doc[max(0, at - cfg.window + 1) : at + 1]
      for h in heads:
        for c, keys in ((1, far), (2, near)):
          out = attention(q[t, h], k[keys, c, g], v[keys, c, g])[1]
          y[t, h] += gates[t, h, c] * out
  return np.einsum('thv,hvd->td', y, p['out']), picked
