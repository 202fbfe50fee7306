"""Bugs of runs: folders, processes, files that a run leaves."""

from tests.mutants.mutant import Mutant

_FOLDER = 'deepseek_jax/run/folder.py'
_AGREEMENT_TEST = 'tests/run/agreement_test.py'

MUTANTS = (
  Mutant(
    'the_name_of_a_folder_is_taken_for_its_step',
    _FOLDER,
    '  if inside != step:\n',
    '  if step < 0:\n',
    (f'{_AGREEMENT_TEST}::the_step_inside_is_the_step',),
    'a checkpoint that was renamed resumes a schedule at the wrong place',
  ),
  Mutant(
    'what_changes_numbers_may_be_edited_in_config_json',
    _FOLDER,
    '  wrong = [lines[n] for n in lines if n in other]\n',
    '  wrong = [lines[n] for n in lines if n != n]\n',
    (f'{_AGREEMENT_TEST}::the_step_inside_is_the_step',),
    'the configuration in a checkpoint was stored and never read',
  ),
  Mutant(
    'processes_may_differ_in_what_a_resumption_may_change',
    'deepseek_jax/run/agreement.py',
    'mine = flatten(as_json(config) | code_of(config))',
    "mine = {'seed': config.seed}",
    (f'{_AGREEMENT_TEST}::every_field_is_compared',),
    'one process saves or validates alone: all wait for ever',
  ),
  Mutant(
    'processes_compare_training_text_alone',
    'deepseek_jax/run/agreement.py',
    "    'tokenizer': store.index['tokenizer']['sha256'],\n",
    '',
    (f'{_AGREEMENT_TEST}::text_and_tokenizer_are_compared',),
    'each node trains its own BPE: ids mean different things',
  ),
  Mutant(
    'the_last_status_of_several_processes_wins',
    'deepseek_jax/parallel/endings.py',
    'if first.process != ending.process and other:',
    'if first.process == ending.process and other:',
    ('tests/parallel/distributed_test.py::first_cause_is_the_cause',),
    'bad input in one process is requeued as a lost peer in the others',
    fast=True,
  ),
  Mutant(
    'damaged_files_overwrite_each_other',
    'deepseek_jax/record/metrics.py',
    'return next(name for name in names if not os.path.lexists(name))',
    'return next(names)',
    ('tests/run/damaged_files_test.py::never_overwrite_each_other',),
    'nothing that a run wrote is lost',
  ),
)
