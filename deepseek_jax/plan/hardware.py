"""Lists accelerators and clusters, every figure with its source.

Peaks are dense (no structured sparsity); links are per device, one direction,
as bytes per second that a collective can use at best. A figure that was not
read in the vendor's own document says so: UNVERIFIED.
"""

import dataclasses
import re

from deepseek_jax.errors import InputError

_V3 = 'DeepSeek-V3, arXiv:2412.19437, section 3.2.2'
_ISCA = 'Insights into DeepSeek-V3, arXiv:2505.09343'
_H100 = "NVIDIA H100 datasheet, SXM, half of the figure 'with sparsity'"
_IB = 'one 400 Gb/s adapter per GPU, as in reference servers'
_NVLINK4 = "NVLink 4, half of the datasheet's 900 GB/s of both directions"
_TPU = 'docs.cloud.google.com/tpu/docs/v5p'
_CLOUDMATRIX = 'CloudMatrix384, arXiv:2506.12708'


@dataclasses.dataclass(frozen=True)
class Figure:
  """Holds a number and where it is from.

  Attributes:
    value: the number.
    source: in words.
    vendor: the source is the vendor's own document, and was read.
  """

  value: float
  source: str
  vendor: bool = False

  @property
  def origin(self) -> str:
    """Returns the source, and whether it can be relied upon."""
    return self.source if self.vendor else f'{self.source}; UNVERIFIED'


def _vendor(value: float, source: str) -> Figure:
  """Returns a figure that was read in the vendor's own document."""
  return Figure(value, source, vendor=True)


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Describes one device.

  Attributes:
    name: as in `--cluster`.
    bf16, fp8: peak FLOP/s; fp8 None where it has no faster 8-bit float.
    memory: bytes.
    memory_bandwidth: bytes/s.
    fast: bytes/s to devices of its node (NVLink, ICI, UB).
    slow: bytes/s to other nodes (InfiniBand, data-centre network).
    node: devices that the fast links join.
    host: devices of one operating system, which writes to storage.
  """

  name: str
  bf16: Figure
  fp8: Figure | None
  memory: Figure
  memory_bandwidth: Figure
  fast: Figure
  slow: Figure
  node: Figure
  host: Figure


_EIGHT = Figure(8, 'HGX and DGX servers hold eight')
_HOPPER = {
  'bf16': _vendor(989.5e12, _H100),
  'fp8': _vendor(1979e12, _H100),
  'node': _EIGHT,
  'host': _EIGHT,
}

ACCELERATORS = {
  a.name: a
  for a in (
    Accelerator(
      'h800',
      bf16=Figure(989.5e12, f'{_H100}; the H800 has the same cores'),
      fp8=Figure(1979e12, f'{_H100}; the H800 has the same cores'),
      node=_EIGHT,
      host=_EIGHT,
      memory=Figure(80e9, 'H100 datasheet; the H800 has the same memory'),
      memory_bandwidth=Figure(
        3.35e12, 'H100 datasheet, SXM; the H800 has the same memory'
      ),
      fast=Figure(160e9, f'{_V3}: NVLink 160 GB/s'),
      slow=Figure(50e9, f'{_V3}: InfiniBand 50 GB/s'),
    ),
    Accelerator(
      'h100',
      **_HOPPER,
      memory=_vendor(80e9, 'H100 datasheet, SXM, 80 GB'),
      memory_bandwidth=_vendor(3.35e12, 'H100 datasheet, SXM, 3.35 TB/s'),
      fast=_vendor(450e9, _NVLINK4),
      slow=Figure(50e9, _IB),
    ),
    Accelerator(
      'h200',
      **_HOPPER,
      memory=_vendor(141e9, 'NVIDIA H200 page, SXM, 141 GB'),
      memory_bandwidth=_vendor(4.8e12, 'NVIDIA H200 page, SXM, 4.8 TB/s'),
      fast=_vendor(450e9, _NVLINK4),
      slow=Figure(50e9, _IB),
    ),
    Accelerator(
      'b200',
      bf16=Figure(2250e12, 'glennklockwood.com, B200 in HGX at 1,000 W'),
      fp8=Figure(4500e12, 'glennklockwood.com, B200 in HGX at 1,000 W'),
      memory=Figure(
        180e9,
        'what HGX B200 servers list of its 192 GB',
      ),
      memory_bandwidth=Figure(8e12, 'glennklockwood.com, B200, 8 TB/s at most'),
      fast=Figure(900e9, 'glennklockwood.com, NVLink 5, one direction'),
      slow=Figure(50e9, _IB),
      node=Figure(8, 'HGX B200 holds eight'),
      host=Figure(8, 'HGX B200 holds eight'),
    ),
    Accelerator(
      'v5p',
      bf16=_vendor(459e12, _TPU),
      fp8=None,
      memory=_vendor(95 * 2**30, f'{_TPU}: 95 GiB'),
      memory_bandwidth=_vendor(2765e9, f'{_TPU}: 2765 GB/s'),
      fast=_vendor(600e9, f'{_TPU}: half of 1200 GB/s of both directions'),
      slow=_vendor(50e9 / 8, f'{_TPU}: data-centre network, 50 Gb/s per chip'),
      node=_vendor(8960, f'{_TPU}: chips of a pod'),
      host=_vendor(4, f'{_TPU}: of 2x2x1, 4 chips, 1 host'),
    ),
    Accelerator(
      '910c',
      bf16=Figure(752e12, f'two dies of 376 TFLOP/s; {_CLOUDMATRIX}'),
      fp8=None,
      memory=Figure(128e9, f'two dies of 64 GB; {_CLOUDMATRIX}'),
      memory_bandwidth=Figure(3.2e12, f'two dies of 1.6 TB/s; {_CLOUDMATRIX}'),
      fast=Figure(392e9, f'UB plane, two dies of 196 GB/s; {_CLOUDMATRIX}'),
      slow=Figure(50e9, f'RDMA plane, two dies of 200 Gb/s; {_CLOUDMATRIX}'),
      node=Figure(384, f'a super-node; {_CLOUDMATRIX}'),
      host=Figure(8, f'a super-node has 48 compute nodes; {_CLOUDMATRIX}'),
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Describes so many of one accelerator."""

  accelerator: Accelerator
  devices: int


def cluster(text: str) -> Cluster:
  """Returns the cluster that 'h800x2048' names; 'h100' alone is one device.

  Raises:
    InputError: no such accelerator, or no count above 0.
  """
  found = re.fullmatch(r'([0-9a-z]+?)(?:x(\d+))?', text.lower())
  name, count = found.groups() if found else (text, None)
  # int() refuses more than 4,300 digits; from 8 on no cluster is meant.
  devices = int(count or 1) if len(count or '') < 8 else 0
  if name not in ACCELERATORS or devices < 1:
    raise InputError(
      f'cluster = {text!r}: write NAMExCOUNT, as h800x2048; names:'
      f' {", ".join(ACCELERATORS)}'
    )
  return Cluster(ACCELERATORS[name], devices)
