"""Compares runs: a table, differences paired by seed, curves in one HTML file.

    deepseek-jax compare runs/mla runs/gqa
    deepseek-jax compare runs/sweep --out=sweep.html --json=sweep.json

A folder that holds runs stands for all of them. Runs that differ in nothing but
their seeds are one arm; the first arm is what the others are compared with.
"""

from absl import flags

from deepseek_jax.cli import common, outputs, side_by_side
from deepseek_jax.errors import InputError

METRIC = 'heldout_bits_per_byte'
_KICKER = 'Comparison'  # of templates/compare.html.jinja
_OUT = flags.DEFINE_string('out', 'compare.html', 'Where the page goes.')
_JSON = flags.DEFINE_string('json', None, 'Where the numbers go as JSON.')
_METRIC = flags.DEFINE_string('metric', METRIC, 'What is compared, at the end.')
_TITLE = flags.DEFINE_string('title', 'Comparison', "The page's headline.")


def main(argv: list[str]) -> None:
  """Compares the runs that the arguments name."""
  if len(argv) < 2:
    raise InputError('give the folders of runs, or a folder that holds runs')
  numbers = outputs.is_json('metric', 'arms')
  out = outputs.check_page(_OUT.value, 'a comparison', _KICKER)
  json = _JSON.value
  if json:
    json = outputs.check('json', json, "a comparison's numbers", numbers)
  given = argv[1:], _METRIC.value, out, _TITLE.value, json
  side_by_side.compare(*given)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, arguments=True, names=None)
