"""Certifies that a Hugging Face checkpoint gives the same logits here.

Text has to become the same tokens, too, and the same tokens have to end it.

python -m experiments.verify --hf=HF_DIR [--out=certificate.json]

Runs transformers (extra [hf]) and this library on the same prompts. Exits with
0 if they agree, 1 if they don't, 2 on bad input. The certificate goes into the
current folder unless --out names another place; one of another checkpoint is
never replaced.
"""

import json
import os
import sys
from collections.abc import Callable

from absl import flags
from rich.console import Console
from rich.table import Table

from deepseek_jax.cli import common, outputs
from deepseek_jax.errors import InputError, naming
from deepseek_jax.hf import verify

_HF = flags.DEFINE_string('hf', None, 'Hugging Face folder.', required=True)
_OUT = flags.DEFINE_string(
  'out',
  'certificate.json',
  'Where the certificate goes; by default the current folder.',
)
_MAX_LOGIT = flags.DEFINE_float(
  'max_logit', verify.MAX_LOGIT, 'Most that a logit may differ.', 0.0
)
_MAX_KL = flags.DEFINE_float(
  'max_kl', verify.MAX_KL, 'Most KL divergence of a token, in nats.', 0.0
)
_LENGTHS = flags.DEFINE_list(
  'lengths', [str(n) for n in verify.LENGTHS], 'Lengths of the prompts.'
)


def tables(certificate: dict) -> list[Table]:
  """Returns the certificate as tables: by case, and by layer over all cases."""
  by_case = Table(title='Logits against transformers')
  by_case.caption = 'ties: choices of a top-k between equal scores'
  for name in (
    'case', 'tokens', 'max |diff|', 'mean |diff|', 'KL', 'top-1', 'ties'
  ):  # fmt: skip
    by_case.add_column(name, justify='left' if name == 'case' else 'right')
  for row in certificate['cases']:
    by_case.add_row(
      row['case'],
      str(row['tokens']),
      f'{row["max"]:.1e}',
      f'{row["mean"]:.1e}',
      f'{row["kl"]:.1e}',
      f'{row["top1"]:.2%}',
      str(row['tied']),
    )
  by_layer = Table(title='Logits of every layer through the final head')
  for name in ('layer', 'max |diff|', 'mean |diff|'):
    by_layer.add_column(name, justify='right')
  per_layer = zip(*(r['layers'] for r in certificate['cases'] if r['layers']))
  for i, gaps in enumerate(per_layer):
    most = max(g['max'] for g in gaps)
    mean = sum(g['mean'] for g in gaps) / len(gaps)
    by_layer.add_row(str(i), f'{most:.1e}', f'{mean:.1e}')
  return [by_case, by_layer]


def _lengths() -> tuple[int, ...]:
  """Returns the lengths of --lengths, all above 0."""
  try:
    lengths = tuple(map(int, _LENGTHS.value))
  except ValueError:
    lengths = ()
  if not lengths or min(lengths) < 1:
    raise InputError(f'--lengths={_LENGTHS.value}: write numbers above 0')
  return lengths


def _is_of(folder: str) -> Callable[[str], bool]:
  """Returns what recognises a certificate of a folder."""

  def recognised(text: str) -> bool:
    found = outputs.is_json('passed', 'folder', 'cases')(text)
    return found and json.loads(text)['folder'] == os.path.realpath(folder)

  return recognised


def main(argv: list[str]) -> None:
  """Prints the certificate; exits with 1 if both sides differ."""
  del argv
  folder = os.path.expanduser(_HF.value)
  what = f'a certificate of {folder}'
  out = outputs.check('out', _OUT.value, what, _is_of(folder))
  certificate = verify.certify(
    folder,
    max_logit=_MAX_LOGIT.value,
    max_kl=_MAX_KL.value,
    lengths=_lengths(),
  )
  with naming(out), open(out, 'w', encoding='utf-8') as file:
    json.dump(certificate, file, indent=2)
  console = Console()
  for table in tables(certificate):
    console.print(table)
  tokens = certificate['tokens']
  print(
    f'Tokens of texts and chats: {tokens["equal"]} of {tokens["compared"]} as'
    ' in transformers'
  )
  for text in tokens['different']:
    print(f'  different: {text!r}')
  for note in tokens['notes']:
    print(f'  {note}')
  verdict = 'PASSED' if certificate['passed'] else 'FAILED'
  print(f'{verdict}: {out.absolute()}')
  sys.exit(0 if certificate['passed'] else 1)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main)
