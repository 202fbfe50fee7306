"""Says what the functions of a model take: help(model.apply) shows it."""

APPLY = """Computes logits, states, cache and statistics of tokens.

Legend: B rows, T tokens, V vocabulary, D width, L memories, K their rows, N
tokens of the longest n-gram.

Args:
  variables: {'params', 'buffers'} as `init` returns them, or cast.
  tokens: [B T] int32, each 0..V - 1 except on padding, where it may be
    anything. Another number is an InputError; inside jit, where it can't be
    known, it gives NaN logits in its row and changes no other.
  positions: [B T] int32; by default those after the cached tokens, or from 0
    within each document.
  segment_ids: [B T] int32. A run of equal ids is a document, which attends to
    no other: the same id further on is another document. 0 is padding, which
    is cached, routed and counted nowhere. One below 0 is an InputError; inside
    jit, where it can't be known, it is padding. None: all of a row is one
    document.
  cache: from `init_cache` or an earlier Output; its slots are positions, and a
    row may go on before its last token (`Cache.rewound`). With one, a row is
    one document: segment_ids tell its tokens, 1, from the padding around them,
    0; after the first call padding comes last. More documents in a row are an
    InputError, and NaN logits in that row inside jit: decode a packed row as
    rows of their own.
  train: applies what is for training only (capacity).
  mtp: runs the multi-token prediction blocks too.
  mtp_state: puts into aux what these blocks start from, for `draft`.
  ngrams: [B T L K] int32, rows of the Engrams' tables that the data pipeline
    has hashed; by default they are hashed here, to the same. What is no row is
    treated as what is no token.
  before: [B N-1] int32, of a model with Engrams and a cache: the tokens before
    a row's first one, in order, instead of those that the cache has seen last.
    What would lie before a document may be anything.
  routes: [B T L K] int32, experts of each token in each layer that has some, in
    order: they are used, and weighted by the live scores. -1 leaves a token to
    the router, as do hash routing and the blocks of multi-token prediction.

Returns:
  An Output: logits [B T V] float32, hidden [B T D], the cache with these tokens
  or None, and aux, the statistics.

Raises:
  InputError: variables or arrays do not fit the model.
"""

DRAFT = """Runs the block of multi-token prediction of a depth; returns a Draft.

Args:
  variables: as of `apply`.
  state: `aux['mtp_state']` of [B T] tokens for depth 1, and for others the
    state that the depth before has drafted.
  tokens: [B T] int32, the token `depth` places on from each.
  cache: from `init_mtp_cache` or an earlier Draft.
  positions: [B T] int32 of the states, not of the tokens ahead.
  valid: [B T] bool, False on padding, which comes last.
  depth: more than there are repeat the last block. Each repetition goes on one
    position: it takes the drafted state for that of the next token.
"""
