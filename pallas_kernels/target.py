"""Names what a program is made for: the device that runs it, not the host.

In this order: what `targeting` names, the devices that `placed_on` knows, the
abstract device of the mesh in use, jax's default device. A CPU host that
lowers for a GPU names it: `with targeting('cuda', '9.0'): ...`.
"""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

# A CPU tells no count of multiprocessors: what is lowered there for Hopper is
# meant for an H100 or H200.
_CORES = 132
# Compile-only and abstract devices have a name, and no capability.
_CAPABILITIES = {
  r'\bA(100|800|30)\b': '8.0',
  r'\bG?H(100|200|800|20)\b': '9.0',
  r'\bG?B(100|200)\b': '10.0',
  r'\bG?B300\b': '10.3',
}


class Target(NamedTuple):
  """Describes a device; of two that are equal one program runs on both.

  Attributes:
    platform: 'cpu', 'cuda', 'rocm', 'tpu', or another that jax names.
    capability: NVIDIA's compute capability ('9.0'), AMD's name of the
      architecture ('gfx942'), or '' where there is none.
    cores: multiprocessors.
  """

  platform: str
  capability: str = ''
  cores: int = _CORES

  @property
  def is_hopper(self) -> bool:
    """Returns whether it is an NVIDIA GPU of compute capability 9."""
    major = self.capability.partition('.')[0]
    return self.platform == 'cuda' and major == '9'

  def __str__(self) -> str:
    """Returns the platform with the capability, as in 'cuda 9.0'."""
    return ' '.join(filter(None, self[:2]))


_named = contextvars.ContextVar('pallas_kernels_target', default=None)
_interpreter = contextvars.ContextVar('pallas_kernels_interpret', default=None)
_placed = contextvars.ContextVar('pallas_kernels_placed', default=None)


def _capability(kind: str) -> str:
  """Returns the capability of a device by its name; '' if not known."""
  found = (c for name, c in _CAPABILITIES.items() if re.search(name, kind))
  return next(found, '')


def of_device(device: Any) -> Target:
  """Returns the target that a device of jax is, real or abstract."""
  platform, kind = device.platform, device.device_kind
  capability = str(getattr(device, 'compute_capability', ''))
  if platform in ('gpu', 'cuda', 'rocm'):
    client = getattr(device, 'client', None)
    told = f'{platform} {getattr(client, "platform_version", "")}'.lower()
    amd = 'rocm' in told or capability.startswith('gfx')
    platform = 'rocm' if amd else 'cuda'
    capability = capability or _capability(kind)
  cores = getattr(device, 'core_count', None)
  cores = cores or getattr(device, 'num_cores', None)
  return Target(platform, capability, cores or _CORES)


def _default_device() -> Any:
  """Returns the device that jax computes on where nothing else says."""
  default = jax.config.jax_default_device
  if isinstance(default, str):
    return jax.devices(default)[0]
  return jax.devices()[0] if default is None else default


def current() -> Target:
  """Returns what is being traced for: see the module."""
  target = _named.get() or _placed.get()
  if target is not None:
    return target
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  return of_device(_default_device() if abstract is None else abstract)


@contextlib.contextmanager
def targeting(platform: str, capability: str = '') -> Iterator[None]:
  """Makes programs traced inside be for this platform, whatever the host has.

  Args:
    platform: 'cpu', 'cuda', 'rocm' or 'tpu'.
    capability: of an NVIDIA GPU, as '9.0'; without one it gets no kernels.

  Raises:
    ValueError: `platform` is none of these, or an NVIDIA GPU's `capability`
      is no number.
  """
  if platform not in ('cpu', 'cuda', 'rocm', 'tpu'):
    raise ValueError(
      f"platform={platform!r}; use 'cpu', 'cuda', 'rocm' or 'tpu'"
    )
  if platform == 'cuda' and not re.fullmatch(r'(\d+\.\d+)?', capability):
    raise ValueError(
      f"capability={capability!r}; give one as '8.0', '9.0' or '10.0'"
    )
  token = _named.set(Target(platform, capability))
  try:
    yield
  finally:
    _named.reset(token)


@contextlib.contextmanager
def placed_on(device: Any) -> Iterator[None]:
  """Makes programs traced inside be for this device, if no target is named."""
  token = _placed.set(of_device(device))
  try:
    yield
  finally:
    _placed.reset(token)


@contextlib.contextmanager
def interpreted_with(params: Any) -> Iterator[None]:
  """Makes kernels traced inside run in the interpreter; see compat."""
  token = _interpreter.set(params)
  try:
    yield
  finally:
    _interpreter.reset(token)


def interpreting() -> Any:
  """Returns the settings of the interpreter; None where a device runs them."""
  return _interpreter.get()
