"""Known bugs of users' own classes: code that a file decides on, or changes."""

from tests.mutants.mutant import Mutant

_OWN = 'deepseek_jax/own_classes.py'
_FILE = 'deepseek_jax/cli/experiment_file.py'
_FILE_TEST = 'tests/cli/experiment_file_test.py'

MUTANTS = (
  Mutant(
    'a_file_that_is_read_imports_code',
    _OWN,
    'found = sys.modules.get(module)',
    'found = __import__(module)',
    ('tests/config_test.py::a_file_decides_on_no_code',),
    'pickled configurations run what they name',
    fast=True,
  ),
  Mutant(
    'a_run_goes_on_with_other_code',
    _OWN,
    'if written and here and written != here:',
    'if written is here is None:',
    ('tests/run/own_classes_test.py::file_that_changed_is_named',),
    'weights of one attention were read by another of the same shapes',
  ),
  Mutant(
    'the_hash_is_of_the_file_as_it_is_now',
    _OWN,
    'digest = getattr(module, DIGEST, None)',
    'digest = None',
    (f'{_FILE_TEST}::keeps_the_hash_of_what_ran',),
    'a file that is edited while the run begins',
  ),
  Mutant(
    'a_configuration_file_takes_the_place_of_a_module',
    _FILE,
    'elif there is not None or _is_taken(name):',
    'elif not name:',
    (f'{_FILE_TEST}::taken_name_is_refused', f'{_FILE_TEST}::two_files_of_one'),
    'an experiment called json.py, and all that imports json',
    fast=True,
  ),
  Mutant(
    'an_extended_attention_is_exported_as_its_base',
    'deepseek_jax/hf/families/__init__.py',
    'in own_classes.kinds(to_dict(config)).items():',
    'in ():',
    ('tests/model/own_layers_test.py::exported_to_no_family',),
    'a sliding window of the same arrays became a Llama without one',
  ),
)
