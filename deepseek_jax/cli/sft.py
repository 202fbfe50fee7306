"""Fine-tunes a model on conversations: full, or adapters alone (LoRA).

    python -m experiments.sft --config=sft_tiny --workdir=runs/sft \\
      --config.data.path=chats.jsonl --config.init_from=runs/v3

Each assistant's turn is an example; what is learnt of the first ones is drawn
below their text before the run. With --config.model.lora set the base is frozen
and its adapters learn. Everything else is as in experiments.pretrain.
"""

from pathlib import Path

from absl import flags
from rich.console import Console

from deepseek_jax.cli import common, post_training, process_flags
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.rl import conversation_store, examples
from deepseek_jax.run import fit as loop

_CONFIG = common.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a started run goes on from it.'
)
flags.mark_flags_as_required(['config', 'workdir'])
flags.declare_key_flag('config')
flags.adopt_module_key_flags(process_flags)


def main(argv: list[str]) -> None:
  """Runs the training, then reports from the first process."""
  del argv
  config = common.frozen(loop.RunConfig, _CONFIG.value)
  if config.chat is None:
    raise InputError(
      'chat = None: fine-tuning reads conversations; set --config.chat, or'
      ' pretrain on text with experiments.pretrain'
    )
  store = conversation_store.build(
    config.data, config.chat, say=lambda line: None
  )
  drawn = examples.shown(store.train[: config.chat.shown], store.tokenizer())
  if distributed.first() and not common.quiet():
    show(drawn, Console())
  run = loop.fit(config, _WORKDIR.value, console=not common.quiet())
  post_training.tuned(run, Path(_WORKDIR.value))


def show(drawn: list[tuple[str, str, str]], console: Console) -> None:
  """Prints examples, and '^' below what is learnt of them."""
  width = max(console.width - 2, 20)
  for where, text, marks in drawn:
    console.rule(f'what is learnt of {where}')
    for start in range(0, len(text), width):
      end = start + width
      for line, style in ((text[start:end], ''), (marks[start:end], 'bold')):
        console.print(line, style=style, markup=False, highlight=False)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, join=process_flags.join)
