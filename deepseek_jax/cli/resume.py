"""Goes on with a run as its folder says, or extends it.

    deepseek-jax resume runs/mine
    deepseek-jax resume runs/mine --tokens=2e6

Nothing of the training command has to be typed again. --tokens makes the run
longer where its schedule allows it: 'constant', and 'wsd' and 'v3' as long as
the learning rate has not begun to fall. --config=FILE names the experiment file
of a run whose configuration has classes of one's own.
"""

from pathlib import Path

from absl import flags

from deepseek_jax.cli import common, experiment_file, process_flags, training
from deepseek_jax.errors import InputError
from deepseek_jax.run import extension, folder

_CONFIG = experiment_file.define_flag()
_TOKENS = flags.DEFINE_float(
  'tokens', None, 'How many tokens the run is to have in all.'
)
flags.declare_key_flag('config')
flags.adopt_module_key_flags(process_flags)
flags.adopt_module_key_flags(training)


def main(argv: list[str]) -> None:
  """Trains the run of a folder to its end."""
  if len(argv) != 2:
    raise InputError(f'arguments {argv[1:]}: give the folder of one run')
  workdir = folder.path_of(argv[1])
  experiment_file.load_flag(_CONFIG)
  config = folder.config_of(workdir)
  if _TOKENS.value is not None:
    config = extension.extended(config, _TOKENS.value, folder.newest(workdir))
  training.train(config, Path(workdir))


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, arguments=True, names=None, join=process_flags.join)
