"""Writes the model of a run as a Hugging Face folder, its tokenizer with it."""

import json
import os

from deepseek_jax.data import boundaries
from deepseek_jax.errors import InputError, told
from deepseek_jax.hf import identity, saving
from deepseek_jax.run import folder


def export_run(
  workdir: str | os.PathLike,
  target: str | os.PathLike,
  *,
  dtype: str | None = None,
  quantize: str | None = None,
) -> None:
  """Writes the newest checkpoint of a run to a folder that transformers reads.

  Args:
    workdir: the run's folder.
    target: the folder to write.
    dtype: of the weights written, 'float32' or 'bfloat16', the default.
    quantize: 'fp8' or 'fp8_ue8m0', or None.

  Raises:
    InputError: the folder holds no run, or the family has no such model.
  """
  if not isinstance(target, str | os.PathLike):
    raise InputError(f'target: is {told(target)}; give the folder to write')
  write(folder.load(workdir), os.fspath(target), dtype, quantize)


def write(
  run: folder.Loaded, target: str, dtype: str | None, quantize: str | None
) -> None:
  """Writes a loaded run; arguments as of `export_run`."""
  tokenizer = run.tokenizer
  extra = {
    'eos_token_id': tokenizer.eos_id,
    'bos_token_id': None,  # documents only end
    'pad_token_id': tokenizer.pad_id,
  }
  rope = getattr(run.config.model.attention, 'rope', None)
  if rope and rope.scaling is None:
    extra['max_position_embeddings'] = run.config.data.seq_len
  saving.save(
    target,
    run.config.model,
    run.variables,
    dtype=dtype,
    quantize=quantize,
    extra=extra,
    source={
      'step': run.step,
      'variables': identity.of_variables(run.variables),
    },
  )
  tokenizer.save(target)
  ends = list(boundaries.of_run(tokenizer).ends)
  about = {'eos_token_id': ends, 'pad_token_id': tokenizer.pad_id}
  path = os.path.join(target, 'generation_config.json')
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(about, file, indent=2)
