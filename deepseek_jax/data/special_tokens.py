"""Reads what the files beside a tokenizer.json declare of special tokens.

tokenizer_config.json names them; older folders add special_tokens_map.json and
added_tokens.json. Which file takes precedence is as in transformers 5.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError

_MAX_BYTES = 10 << 20
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')

_ORDER = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')  # new ids follow it


class Declared(NamedTuple):
  """Holds the special tokens by the files beside a tokenizer.json."""

  names: dict[str, str]  # 'eos_token' -> '</s>'
  more: tuple[str, ...]  # special tokens without such a name
  added: tuple[dict[str, Any], ...]  # content and flags, in order of id
  adds_bos: bool | None  # the value of add_bos_token; None if absent
  adds_eos: bool | None


def name(token: Any) -> Any:
  """Returns the text of a token that is written as text or as an object."""
  return token.get('content') if isinstance(token, dict) else token


def read(folder: str, file: str) -> dict[str, Any]:
  """Returns the JSON object of a file; {} if the folder has no such file."""
  path = os.path.join(os.path.expanduser(folder), file)
  if not os.path.lexists(path):
    return {}
  try:
    with open(path, encoding='utf-8') as stream:
      text = stream.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
      raise InputError(f'{path}: longer than {_MAX_BYTES} characters: refused')
    out = json.loads(text)
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path}: cannot be read: {error}') from None
  except (ValueError, RecursionError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f'{path} is not JSON: {error}') from None
  if not isinstance(out, dict):
    raise InputError(f'{path} holds no JSON object')
  return out


def declared(folder: str) -> Declared:
  """Reads what a folder declares; raises InputError if it can't be read."""
  config = read(folder, 'tokenizer_config.json')
  fields, added = dict(config), {}
  if 'added_tokens_decoder' in config:
    added = config['added_tokens_decoder']
  else:
    fields |= read(folder, 'special_tokens_map.json')
    added = _legacy(read(folder, 'added_tokens.json'), fields)
  try:
    ordered = sorted((int(i), dict(t)) for i, t in added.items())
    tokens = [_token(t) for _, t in ordered]
  except (AttributeError, TypeError, ValueError, KeyError):
    raise InputError(
      f'{os.path.join(folder, "tokenizer_config.json")}: added_tokens_decoder:'
      ' write {id: {"content": token, ...}}'
    ) from None
  names = {}
  for key in sorted(fields, key=_order):
    if key.endswith('_token') and isinstance(name(fields[key]), str):
      names[key] = name(fields[key])
      if isinstance(fields[key], dict):  # with flags of its own
        tokens.append({'normalized': True} | _token(fields[key]))
  flags = (config.get(key) for key in ('add_bos_token', 'add_eos_token'))
  return Declared(names, _more(fields), tuple(tokens), *flags)


def _order(key: str) -> int:
  """Returns the place of a token's name among those that new ids follow."""
  return _ORDER.index(key[:-6]) if key[:-6] in _ORDER else len(_ORDER)


def _token(token: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a token's text and flags; KeyError if it has no text."""
  flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
  return {'content': str.__str__(token['content']), **flags}


def _more(fields: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns what extra_special_tokens holds, under either of its names."""
  found = fields.get('extra_special_tokens')
  found = found or fields.get('additional_special_tokens') or ()
  tokens = found.values() if isinstance(found, dict) else found
  if not isinstance(found, list | tuple | dict):
    tokens = ()
  return tuple(t for t in map(name, tokens) if isinstance(t, str))


def _legacy(added: Mapping[str, int], fields: Mapping[str, Any]) -> dict:
  """Returns added_tokens.json in the form of added_tokens_decoder."""
  special = {name(v) for v in fields.values() if isinstance(v, str | dict)}
  return {
    i: {
      'content': token,
      'special': token in special,
      'normalized': token not in special,
    }
    for token, i in added.items()
  }
