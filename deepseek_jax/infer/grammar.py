"""Restricts what is sampled to JSON, a JSON schema, a regex or a Lark grammar.

A Grammar says what is wanted; a Matcher follows one answer and says which
tokens may come next. llguidance does the work (extra `grammar`).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError, install
from deepseek_jax.infer.formats.message import check_json, shown

MAX_SIZE = 1 << 16  # characters of a grammar
_KINDS = ('json', 'schema', 'regex', 'lark')


@dataclasses.dataclass(frozen=True)
class Grammar:
  """Describes the texts that are allowed.

  Attributes:
    kind: 'json' (any object), 'schema', 'regex' or 'lark'.
    text: the schema as JSON, the regex or the Lark grammar.
    whitespace: whether JSON may have blanks between its parts. A small model
      may then write blanks for ever.
  """

  kind: str
  text: str = ''
  whitespace: bool = False

  def __post_init__(self) -> None:
    """Raises InputError for an unknown kind, or a grammar past the limits."""
    if self.kind not in _KINDS:
      raise InputError(
        f'grammar.kind = {self.kind!r}: must be one of {", ".join(_KINDS)}'
      )
    if not isinstance(self.text, str):
      raise InputError('grammar.text: must be a text')
    if len(self.text) > MAX_SIZE:
      raise InputError(
        f'grammar: {len(self.text)} characters; at most {MAX_SIZE}'
      )
    if self.kind == 'schema':
      _check_schema(self.text)

  @classmethod
  def of_schema(
    cls, schema: Mapping[str, Any] | bool | str, *, whitespace: bool = False
  ) -> 'Grammar':
    """Returns the grammar of a JSON schema, an object or its JSON."""
    if not isinstance(schema, str):
      try:
        schema = json.dumps(schema)
      except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f'grammar: the schema is no JSON: {error}') from None
    return cls('schema', schema, whitespace)

  @classmethod
  def of_response_format(cls, form: Any) -> 'Grammar | None':
    """Returns the grammar of an OpenAI-style response_format; None for text.

    Besides json_object and json_schema, {'type': 'regex', 'regex': ...} and
    {'type': 'lark', 'lark': ...} are known.
    """
    kind = form.get('type') if isinstance(form, Mapping) else form
    kind = kind if isinstance(kind, str | None) else shown(kind)
    if kind in (None, 'text'):
      return None
    if kind == 'json_object':
      return cls('json')
    value = form.get(kind) if isinstance(form, Mapping) else None
    if kind == 'json_schema':
      value = value.get('schema') if isinstance(value, Mapping) else None
      if isinstance(value, Mapping | bool):
        return cls.of_schema(value)
    elif kind in ('regex', 'lark') and isinstance(value, str):
      return cls(kind, value)
    raise InputError(
      f'response_format.type = {shown(kind)}: must be text, json_object,'
      ' json_schema with json_schema.schema, regex or lark'
    )

  def matcher(
    self,
    tokenizer: Tokenizer | ByteTokenizer,
    vocab_size: int | None = None,
    ends: Sequence[int] = (),
  ) -> 'Matcher':
    """Returns a matcher of one answer, see `Matchers`; what it needs is kept.

    Raises InputError, one line, for a grammar that is wrong or unsupported.
    """
    return _matchers(tokenizer, vocab_size, tuple(ends)).matcher(self)


@functools.lru_cache(maxsize=8)
def _matchers(
  tokenizer: Tokenizer | ByteTokenizer,
  vocab_size: int | None,
  ends: tuple[int, ...],
) -> 'Matchers':
  """Returns the matchers of a tokenizer; the last few are kept."""
  return Matchers(tokenizer, vocab_size=vocab_size, ends=ends)


def _check_schema(text: str) -> None:
  """Raises InputError if a text is no JSON schema of bounded depth."""
  try:
    schema = json.loads(text)
  except RecursionError:
    raise InputError('grammar: the schema is nested too deeply') from None
  except ValueError as error:
    raise InputError(f'grammar: the schema is no JSON: {error}') from None
  if not isinstance(schema, dict | bool):
    raise InputError('grammar: a schema is an object, or true or false')
  check_json(schema, 'grammar.text')


def _library() -> Any:
  """Returns llguidance; InputError if it is not installed."""
  try:
    import llguidance
  except ImportError:
    raise InputError(
      f'grammar needs llguidance, {install("grammar")}'
    ) from None
  return llguidance


class _Bytes:
  """Shows a ByteTokenizer to llguidance."""

  bos_token_id = None

  def __init__(self, tokenizer: ByteTokenizer, vocab_size: int):
    """Takes the size of the model's vocabulary, which may be larger."""
    self.eos_token_id = tokenizer.eos_id
    first = tokenizer.vocab_size - 256
    self.special_token_ids = list(range(first))
    tokens = [tokenizer.decode([i]).encode() for i in range(first)]
    tokens += [bytes([byte]) for byte in range(256)]
    self.tokens = tokens + [b''] * (vocab_size - len(tokens))
    self._encode = tokenizer.encode

  def __call__(self, text: str | bytes) -> list[int]:
    """Returns the token ids of a text."""
    text = text.decode('utf-8', 'replace') if isinstance(text, bytes) else text
    return self._encode(text)


class Matchers:
  """Makes matchers for the answers of one model.

  What is costly, the tokenizer's tree and each grammar, is made once.
  """

  def __init__(
    self,
    tokenizer: Tokenizer | ByteTokenizer,
    *,
    vocab_size: int | None = None,
    ends: Sequence[int] = (),
  ):
    """Prepares a tokenizer.

    Args:
      tokenizer: of the model.
      vocab_size: V of the model; tokens past the tokenizer's are never allowed.
      ends: tokens that end an answer; by default the tokenizer's.

    Raises:
      InputError: llguidance is missing, or the model's vocabulary is smaller
        than the tokenizer's.
    """
    library = _library()
    self.vocab_size = vocab_size or tokenizer.vocab_size
    if self.vocab_size < tokenizer.vocab_size:
      raise InputError(
        f'grammar: the tokenizer has {tokenizer.vocab_size} tokens, the model'
        f' only {self.vocab_size}; give the tokenizer of the model'
      )
    self.ends = tuple(dict.fromkeys(map(int, ends))) or (tokenizer.eos_id,)
    unknown = [end for end in self.ends if not 0 <= end < self.vocab_size]
    if unknown:
      raise InputError(
        f'grammar: end token {unknown[0]} is outside the vocabulary of'
        f' {self.vocab_size}'
      )
    if isinstance(tokenizer, ByteTokenizer):
      source: Any = library.TokenizerWrapper(_Bytes(tokenizer, self.vocab_size))
    else:
      source = tokenizer.text_json
    self._library = library
    self._tokenizer = library.LLTokenizer(
      source, n_vocab=self.vocab_size, eos_token=list(self.ends)
    )
    known = np.arange(-(-self.vocab_size // 32) * 32) < tokenizer.vocab_size
    # [ceil(V / 32)] int32 with a bit for each token of the tokenizer.
    self._known = np.packbits(known, bitorder='little').view(np.int32)
    self._compiled = functools.lru_cache(maxsize=64)(self._compile)

  def check(self, grammar: Grammar) -> None:
    """Raises InputError, one line, if a grammar is wrong or unsupported."""
    self._compiled(grammar)

  def matcher(self, grammar: Grammar) -> 'Matcher':
    """Returns a matcher at the start of an answer; see `check`."""
    return Matcher(
      self._compiled(grammar).deep_copy(),
      self.vocab_size,
      self.ends,
      self._known,
    )

  def _compile(self, grammar: Grammar) -> Any:
    """Returns llguidance's matcher of a grammar."""
    library, text = self._library.LLMatcher, grammar.text
    if grammar.kind in ('json', 'schema'):
      text = '{"type": "object"}' if grammar.kind == 'json' else text
      text = {'true': '{}', 'false': '{"enum": []}'}.get(text.strip(), text)
      found = library.grammar_from_json_schema(
        text, overrides={'whitespace_flexible': grammar.whitespace}
      )
    elif grammar.kind == 'regex':
      found = library.grammar_from_regex(text)
    else:
      found = library.grammar_from_lark(text)
    out = library(self._tokenizer, found, log_level=0)
    if out.is_error():
      raise InputError(f'grammar: {grammar.kind}: {_line(out.get_error())}')
    return out


class Matcher:
  """Follows one answer."""

  def __init__(
    self, inner: Any, vocab_size: int, ends: tuple[int, ...], known: np.ndarray
  ):
    """Takes llguidance's matcher; made by `Matchers.matcher`."""
    self._inner, self._V, self._ends = inner, vocab_size, ends
    self._known = known
    self._count = 0  # tokens that were accepted, ends included
    self._ended = False  # by the last token

  def mask(self) -> np.ndarray:
    """Returns which tokens may come next: [ceil(V / 32)] int32, bit t % 32.

    Never empty: behind an end it has the ends, though none is accepted.
    """
    out = np.zeros_like(self._known)
    if not self.finished:
      found = np.frombuffer(self._inner.compute_bitmask(), np.int32)
      self._check()
      size = min(len(found), len(out))  # theirs may be one longer
      out[:size] = found[:size] & self._known[:size]
    # Ends may be any tokens of the model.
    bits = out.view(np.uint32)
    for end in self._ends:
      bit = np.uint32(1 << end % 32)
      bits[end // 32] &= ~bit
      if self.accepting:
        bits[end // 32] |= bit
    return out

  def accept(self, token: int) -> bool:
    """Takes the next token; returns whether it is allowed.

    One that is not changes nothing.
    """
    token = int(token)
    if self._ended or not 0 <= token < self._V:
      return False
    if token in self._ends:
      self._ended = self.accepting
      self._count += self._ended
      return self._ended
    taken = not self._inner.is_stopped() and bool(
      self._inner.try_consume_tokens([token])
    )
    self._check()
    self._count += taken
    return taken

  def copy(self) -> 'Matcher':
    """Returns a matcher that goes its own way from here."""
    out = Matcher(self._inner.deep_copy(), self._V, self._ends, self._known)
    out._count, out._ended = self._count, self._ended
    return out

  def validate(self, tokens: Sequence[int]) -> int:
    """Returns how many of the next tokens are allowed; changes nothing."""
    count = 0
    while count < len(tokens) and self.accept(tokens[count]):
      count += 1
    self.rollback(count)
    return count

  def rollback(self, count: int) -> None:
    """Takes back the last tokens; InputError for more than there were."""
    if not 0 <= count <= self._count:
      raise InputError(
        f'grammar: cannot take back {count} of {self._count} tokens'
      )
    self._count -= count
    if count and self._ended:
      self._ended, count = False, count - 1
    if count:
      self._inner.rollback(count)
      self._check()

  @property
  def accepting(self) -> bool:
    """Returns whether the text so far is one of the grammar's."""
    return bool(self._inner.is_accepting())

  @property
  def ended(self) -> bool:
    """Returns whether the last token was an end."""
    return self._ended

  @property
  def finished(self) -> bool:
    """Returns whether nothing may follow but an end, or an end came."""
    return self._ended or bool(self._inner.is_stopped())

  def _check(self) -> None:
    """Raises InputError if llguidance gave up, as on a limit of its own."""
    if self._inner.is_error():
      raise InputError(f'grammar: {_line(self._inner.get_error())}')


def _line(text: str) -> str:
  """Returns an error of llguidance as one line."""
  text = text.partition('<state>')[0]
  line = ' '.join(text.split())
  return ''.join(c if c.isprintable() else '\ufffd' for c in line)[:300]
