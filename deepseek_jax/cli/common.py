"""Defines what every launcher shares: the process, flags, clean errors.

Exit codes: 0 done; 2 bad input; 77 preempted by SIGTERM or Ctrl-C and saved,
start it again; 143 SIGTERM before the first step, start it again, too; 130
Ctrl-C with nothing new to save; 78 the run gave up, starting it again would
repeat it (see RunAborted); 79 a step hung, all stacks are on stderr (see
watchdog), or lost another process of the run, start all again (JAX itself may
end them by SIGABRT, 134). Several processes end with one status (see endings).
"""

import ctypes
import dataclasses
import errno
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, Literal


def _keep_freed_pages() -> None:
  """Stops glibc from handing big freed buffers back to the kernel.

  XLA on CPU allocates its temporaries anew in every step; mapping them in
  again can take up to half of the step. Other C libraries have no mallopt.
  """
  try:
    libc = ctypes.CDLL('libc.so.6')
  except OSError:
    return
  trim_threshold, mmap_max = -1, -4
  libc.mallopt(mmap_max, 0)
  libc.mallopt(trim_threshold, -1)


_keep_freed_pages()  # before jax allocates

import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_dict, config_flags  # noqa: E402

from deepseek_jax import config as configs  # noqa: E402
from deepseek_jax import say  # noqa: E402
from deepseek_jax.cli import (  # noqa: E402
  config_faults,
  experiment_file,
  help,
  kinds,
  named,
  pipes,
)
from deepseek_jax.errors import (  # noqa: E402
  InputError,
  Preempted,
  RunAborted,
  Terminated,
)
from deepseek_jax.parallel import endings  # noqa: E402
from deepseek_jax.parallel import processes as distributed  # noqa: E402
from deepseek_jax.run.config import RunConfig  # noqa: E402
from deepseek_jax.version import __version__  # noqa: E402

_QUIET = flags.DEFINE_bool('quiet', False, 'Print results and errors alone.')
_VERBOSE = flags.DEFINE_bool(
  'verbose', False, "Print JAX's and orbax's logs, and where errors arose."
)
_VERSION = flags.DEFINE_bool('version', False, 'Print the version and end.')
# Flag -> pairs (path, kind): what --config.PATH.kind=KIND switches.
_SWITCHES: dict[str, list[tuple[str, str]]] = {}

# Other threads' arenas map big buffers in anew whatever malloc is told, and
# free them some time after a step's results are there; so steps run on this
# thread (on two cores 2.5 to 2.1 s a step, and no second set of buffers).
jax.config.update('jax_cpu_enable_async_dispatch', False)

# Flags of the launchers that name what they write.
_WRITTEN = ('workdir', 'to', 'out', 'json', 'picture', 'timeline')
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir() -> Path:
  """Returns where compiled programs and tokens are kept between runs."""
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(home) / 'deepseek_jax'


def editable(config: Any) -> config_dict.ConfigDict:
  """Returns a dataclass tree as a ConfigDict for flags, typed and locked.

  A field that may be None takes what a flag gives, as Python's literals are
  read (--config.x=None too); `frozen` checks its type.
  """
  return _editable(config, configs.to_dict(config))


def _editable(config: Any, plain: dict) -> config_dict.ConfigDict:
  """Returns `plain`, the fields of `config`, as a locked ConfigDict.

  `config` is a dataclass or a mapping.
  """
  optional = configs.optional_fields(type(config))
  held = config if isinstance(config, Mapping) else vars(config)
  fields = {}
  for name, value in plain.items():
    # Keys of a mapping that may be absent are no fields: paths have dots.
    if isinstance(value, dict) and not (
      name in optional and not dataclasses.is_dataclass(held[name])
    ):
      value = _editable(held[name], value)
    # A reference keeps the type of a field whose value may be None, as may an
    # entry of a mapping (an axis of the mesh's rules) that is no part itself.
    entry = isinstance(config, Mapping) and isinstance(value, str | tuple)
    if value is None or name in optional or entry:
      kind = optional.get(name, object)
      value = config_dict.FieldReference(value, field_type=kind)
    fields[name] = value
  return config_dict.ConfigDict(fields, convert_dict=False).lock()


def frozen(cls: type, config: config_dict.ConfigDict) -> Any:
  """Returns the dataclass of a ConfigDict; InputError names a wrong field."""
  return configs.from_dict(cls, config.to_dict())


def define_config(
  name: str = 'config',
  what: str = 'A name, or a file with get_config(); change a field with'
  ' --config.field=value.',
) -> flags.FlagHolder:
  """Defines --config; its value is a ConfigDict, edited by other flags."""
  holder = config_flags.DEFINE_config_file(name, None, what)

  def parse(path: str) -> Any:
    file, colon, asked = path.partition(':')
    if not os.path.exists(file):
      raise flags.Error(f'--{name}={path}: no such file')
    try:
      module = experiment_file.load(file)
      if not hasattr(module, 'get_config'):
        raise flags.Error(f'--{name}={path}: has no function get_config()')
      made = module.get_config(*[asked] * len(colon))
      if dataclasses.is_dataclass(made):
        made = editable(made)
      if isinstance(made, config_dict.ConfigDict):
        experiment_file.check_name(made.to_dict(), file)
        kinds.apply(made, _SWITCHES.get(name, ()), editable, _say_once)
    except (TypeError, ValueError) as error:
      # absl shows these without where they come from.
      raise ValueError(
        f'{config_faults.WHILST}\n\n{traceback.format_exc()}'
      ) from error
    return made

  flags.FLAGS[name].parser.parse = parse
  return holder


_DOC = ['']  # of the launcher, for --help
_said: set[str] = set()


def _say_once(line: str) -> None:
  """Prints a line on stderr: a config is parsed again for some messages."""
  if line not in _said:
    _said.add(line)
    say.warn(line)


def quiet() -> bool:
  """Returns whether the user wants results and errors alone."""
  return _QUIET.value


def verbose() -> bool:
  """Returns whether the user wants logs and tracebacks."""
  return _VERBOSE.value


def _fail(message: object, status: int) -> None:
  """Ends the program with one line on stderr."""
  endings.leave(status, f'error: {" ".join(str(message).split())}')


_CONFIGS = ('--config', '-config', '--versus', '-versus')


def _as_files(argv: list[str], kind: str) -> list[str]:
  """Returns flags with --config=v3_tiny as a file that has that name.

  So does --config v3_tiny: from here on both parts are one argument.
  """
  out, rest = [], list(argv)
  while rest:
    arg = rest.pop(0)
    flag, equals, value = arg.partition('=')
    if flag in _CONFIGS and not equals and rest and rest[0][:1] != '-':
      value = rest.pop(0)
      arg = f'{flag}={value}'
    if flag in _CONFIGS and named.is_name(value) and not os.path.exists(value):
      arg = f'{flag}={named.__file__}:{kind}:{value}'
    out.append(arg)
  return out


def _show_flags(module: str) -> None:
  """Makes --help list a launcher's flags, whichever file started it."""
  for place in (module, __name__):
    for flag in flags.FLAGS.get_key_flags_for_module(place):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _help(argv: list[str], section: str) -> None:
  """Prints the launcher's flags, or with --config its fields, and ends."""
  given = kinds.joined(argv[1:])
  given = [a for a in given if a.startswith(('--config', '-config'))]
  config = None
  if given:
    # Required flags may be missing; fields are shown as other flags set them.
    needed = [f'--{n}=.' for n in ('workdir',) if n in flags.FLAGS]
    flags.FLAGS([argv[0], *given, *needed])
    _open_config()
    config = flags.FLAGS['config'].value
  if section and not isinstance(config, config_dict.ConfigDict):
    raise InputError(
      f'--help={section}: shows a section of a configuration; give'
      ' --config=NAME_OR_FILE, too'
    )
  if not section:
    print(help.of_launcher(_DOC[0], argv[0]))
  if isinstance(config, config_dict.ConfigDict):
    cls = named.PlanConfig if 'recipe' in config else RunConfig
    print('' if section else '\nfields:\n', end='' if section else '\n')
    print(help.of_config(frozen(cls, config), section))
  sys.stdout.flush()  # a reader that has left is noticed here
  sys.exit(0)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; any mistake becomes one line and status 2."""
  try:
    if any(a in ('--version', '-version') for a in argv[1:]):
      print(f'deepseek-jax {__version__}')
      sys.exit(0)
    section = help.asked(argv[1:])
    if section is not None:
      _help(argv, section)
    rest = flags.FLAGS(argv)
    _open_config()
    return rest
  except InputError as error:
    _fail(error, 2)
  except flags.Error as error:
    _fail(config_faults.cause(error), 2)
  except (AttributeError, KeyError) as error:
    # ml_collections names the last part of the field alone.
    plain = error.args[0] if error.args else error
    told = (
      config_faults.in_file(error, argv)
      or config_faults.unknown_field(argv)
      or config_faults.cause(plain)
    )
    _fail(told, 2)
  except (TypeError, ValueError) as error:
    plain = error.args[0] if error.args else error
    _fail(config_faults.inside_none(argv) or config_faults.cause(plain), 2)
  except BrokenPipeError:
    pipes.end_quietly()
  except (OSError, ImportError) as error:
    path = config_faults.config_path(argv)
    if path and not os.path.exists(path):
      _fail(f'--config={path}: no such file', 2)
    _fail(f'--config: {error}', 2)
  except Exception as error:  # the user's file may raise anything
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = '' if isinstance(error, SyntaxError) else config_faults.place(at)
    _fail(f'--config: {type(error).__name__}: {error}{where}', 2)


def _open_config() -> None:
  """Raises now what ml_collections keeps for the first look at a config."""
  if 'config' not in flags.FLAGS or flags.FLAGS['config'].value is None:
    return
  config = flags.FLAGS['config'].value
  if isinstance(config, str):  # of a launcher that reads a run's folder
    return
  try:
    known = config.to_dict
  except AttributeError:
    known = None
  if known is None:
    raise TypeError(
      f'--config: get_config() returns {type(config).__name__}; return a'
      ' RunConfig, as ds.recipes has them'
    )


def _keep_compiled_programs() -> None:
  """Turns the compilation cache on, but not for a CPU with an older jax.

  There, reading some programs back crashes the process (jax 0.10.2: a
  segmentation fault in deserialize_executable; 0.12 reads the same ones).
  """
  if jax.default_backend() != 'cpu' or jax.__version_info__ >= (0, 12):
    jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))


def _print_errors_once() -> None:
  """Silences logs: a failure is one line; orbax would log pages about it."""
  logging.set_verbosity(logging.FATAL)
  getLogger('asyncio').setLevel('CRITICAL')

  def hook(unraisable: Any) -> None:
    # Writes that a failed save leaves behind raise this error.
    if str(unraisable.exc_value) != 'Event loop is closed':
      sys.__unraisablehook__(unraisable)

  sys.unraisablehook = hook


def _place_of(error: OSError) -> str:
  """Returns the file that the system refused, or the folders written to."""
  if isinstance(error.filename, str | bytes) and error.filename:
    return os.fsdecode(error.filename)
  given = flags.FLAGS.flag_values_dict() if flags.FLAGS.is_parsed() else {}
  places = [f'--{n}={given[n]}' for n in _WRITTEN if given.get(n)]
  return f'a file below {" or ".join(places)}' if places else 'a file'


def launch(
  main: Callable[[list[str]], None],
  *,
  arguments: bool = False,
  names: Literal['run', 'plan'] | None = 'run',
  join: Callable[[], object] = lambda: None,
) -> None:
  """Runs `main(argv)` as a program.

  Args:
    main: the program.
    arguments: allows others than flags.
    names: what --config=NAME may name, see `named`; None takes files alone.
    join: joins several processes to one run, before JAX looks for devices.
  """

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1 and not arguments:
      _fail(
        f'unknown arguments {argv[1:]}: flags begin with --, values follow a =',
        2,
      )
    if not _VERBOSE.value:
      _print_errors_once()
    try:
      join()
      _keep_compiled_programs()
      main(argv)
      distributed.wait_for_all()  # one of them may still find a fault
      sys.stdout.flush()
    except BrokenPipeError as error:
      if not pipes.output_is_closed():
        _fail(f'{_place_of(error)}: {error.strerror}', InputError.status)
      pipes.end_quietly()
    except InputError as error:
      if _VERBOSE.value:
        traceback.print_exc()
      _fail(error, error.status)
    except OSError as error:
      what = error.strerror or str(error) or type(error).__name__
      told = f'{_place_of(error)}: {what}'
      if error.errno in _NO_ROOM:
        told = f'{told}; make room and start again'
      _fail(told, InputError.status)
    except Terminated as error:
      endings.leave(error.status, str(error))
    except Preempted as error:
      print(error, flush=True)
      sys.exit(error.status)
    except RunAborted as error:
      _fail(error, error.status)
    except Exception as error:
      if not distributed.several():
        raise
      if endings.announced() is None:  # else it is a consequence
        traceback.print_exc()
      lost = distributed.peer_lost(error)
      _fail(lost or error, lost.status if lost else 1)

  _show_flags(main.__module__)
  _DOC[:] = [sys.modules[main.__module__].__doc__ or '']
  if names:
    given, found = kinds.taken(_as_files(sys.argv[1:], names))
    sys.argv[1:] = given
    _SWITCHES.update(found)
  try:
    app.run(guarded, flags_parser=_parse)
  except KeyboardInterrupt:
    _fail('interrupted; what was saved before stays', 130)
