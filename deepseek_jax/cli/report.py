"""Draws the report of a run anew, with the curves of other runs over its own.

    deepseek-jax report runs/mine
    deepseek-jax report runs/mine runs/other runs/sweep --out=beside.html

The first run is reported, also one that is under way or was killed; of the
others the curves are shown. A folder that holds runs stands for all of them.
Nothing is computed: headline and samples are those that the run ended with.
"""

from absl import flags

from deepseek_jax.cli import common, redraw

_OUT = flags.DEFINE_string(
  'out', None, 'Where the page goes; by default RUN/report.html.'
)


def main(argv: list[str]) -> None:
  """Draws the report of the run that the first argument names."""
  written = redraw.redrawn(argv[1:], _OUT.value)
  print(f'report: {written.absolute()}')


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, arguments=True, names=None)
