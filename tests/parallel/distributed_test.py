"""Who is who, and which rows of a batch a process reads."""

import io
import types
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.parallel import endings, placement
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.parallel.processes import Rendezvous, find_cluster

_SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_NTASKS': '4',
  'SLURM_PROCID': '1',
  'SLURM_STEP_NODELIST': 'a[1-4]',
}
_OWN = {
  'DSJ_COORDINATOR': 'host:1234',
  'DSJ_PROCESSES': '2',
  'DSJ_PROCESS': '1',
}
_POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'}


class ClusterTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, Rendezvous('nobody', None, 1, 0)),
    (_SLURM, Rendezvous('slurm')),
    (_SLURM | {'SLURM_NTASKS': '1'}, Rendezvous('nobody', None, 1, 0)),
    # A shell inside of an allocation is no step of it.
    (
      {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'},
      Rendezvous('nobody', None, 1, 0),
    ),
    ({'OMPI_COMM_WORLD_SIZE': '8'}, Rendezvous('openmpi')),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, Rendezvous('nobody', None, 1, 0)),
    (_POD, Rendezvous('kubernetes')),
    # A pod that is no part of an indexed job.
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, Rendezvous('nobody', None, 1, 0)),
    (_OWN, Rendezvous('environment', 'host:1234', 2, 1)),
    (_OWN | _SLURM | _POD, Rendezvous('environment', 'host:1234', 2, 1)),
    (_POD | {'DSJ_PROCESSES': '1'}, Rendezvous('environment', None, 1, 0)),
  )
  def test_what_the_environment_says(self, environment, want):
    self.assertEqual(find_cluster(environment=environment), want)

  def test_arguments_win_over_the_environment(self):
    got = find_cluster('other:99', 3, 0, environment=_OWN | _SLURM)
    self.assertEqual(got, Rendezvous('arguments', 'other:99', 3, 0))
    got = find_cluster(processes=1, environment=_OWN | _SLURM)
    self.assertEqual(got, Rendezvous('arguments', None, 1, 0))

  @parameterized.parameters(
    (('a:1', 2, None), 'process is missing: give all of coordinator'),
    ((None, 2, 0), 'coordinator is missing'),
    (('a:1', None, 0), 'processes is missing'),
    (('a:1', 2, 2), r'process = 2: must lie in 0..1 with processes = 2'),
    (('a:1', 2, -1), r'process = -1: must lie in'),
    (('a', 2, 1), r"coordinator = 'a': write host:port"),
  )
  def test_incomplete_arguments_are_named(self, given, message):
    with self.assertRaisesRegex(InputError, message):
      find_cluster(*given, environment={})

  @parameterized.parameters(
    ({'DSJ_PROCESS': 'one'}, r"DSJ_PROCESS = 'one': must be a whole number"),
    ({'DSJ_PROCESS': ''}, 'DSJ_PROCESS is missing: give all of DSJ_COORD'),
    ({'DSJ_PROCESSES': '1000', 'DSJ_PROCESS': '1000'}, r'lie in 0..999 with'),
  )
  def test_variables_that_make_no_sense_are_named(self, change, message):
    with self.assertRaisesRegex(InputError, message):
      find_cluster(environment=_OWN | change)

  def test_a_process_by_itself_is_left_as_it_is(self):
    with mock.patch.object(jax.distributed, 'initialize') as initialize:
      distributed.init_distributed(processes=1)
    initialize.assert_not_called()
    self.assertFalse(distributed.several())
    self.assertTrue(distributed.first())
    self.assertEqual(distributed.from_first(7), 7)
    with self.assertRaises(SystemExit) as caught:
      endings.leave(79)
    self.assertEqual(caught.exception.code, 79)
    endings.watch()

  def test_what_jax_cannot_find_is_one_clear_line(self):
    with (
      mock.patch.dict('os.environ', _POD),
      mock.patch.object(
        jax.distributed,
        'initialize',
        side_effect=ValueError('coordinator_address should be defined.'),
      ),
      self.assertRaisesRegex(InputError, 'found by kubernetes: coordinator_'),
    ):
      distributed.init_distributed()


class TogetherTest(parameterized.TestCase):
  """What processes do, with the others played."""

  def several(self, *, first: bool) -> mock.Mock:
    self.enter_context(
      mock.patch.multiple(
        distributed, several=lambda: True, first=lambda: first
      )
    )
    return self.enter_context(mock.patch.object(distributed, 'wait_for_all'))

  @parameterized.parameters((True, ['body', 'wait']), (False, ['wait', 'body']))
  def test_one_goes_first(self, first, want):
    order = []
    self.several(first=first).side_effect = lambda: order.append('wait')
    with distributed.first_goes_first():
      order.append('body')
    self.assertEqual(order, want)

  def test_none_waits_for_one_that_failed(self):
    wait = self.several(first=True)
    with self.assertRaises(InputError), distributed.first_goes_first():
      raise InputError('no such file')
    wait.assert_not_called()

  def test_a_failed_collective_is_a_lost_peer_and_memory_is_not(self):
    self.several(first=False)
    failed = jax.errors.JaxRuntimeError('UNKNOWN: Gloo failed: reset\nstack')
    lost = distributed.peer_lost(failed)
    self.assertEqual(lost.status, 79)
    self.assertRegex(str(lost), r'seems to be gone \(UNKNOWN: Gloo failed: res')
    self.assertNotIn('\n', str(lost))
    full = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')
    self.assertIsNone(distributed.peer_lost(full))
    self.assertIsNone(distributed.peer_lost(ValueError('Gloo')))

  def test_alone_every_error_is_its_own(self):
    failed = jax.errors.JaxRuntimeError('INTERNAL: a defect')
    self.assertIsNone(distributed.peer_lost(failed))

  def store(self) -> dict:
    """What processes leave with the coordination service, played by a dict."""
    kept = {}

    def put(key, value, allow_overwrite=False):
      if key in kept and not allow_overwrite:
        raise jax.errors.JaxRuntimeError('ALREADY_EXISTS')
      kept[key] = value

    def get(key):
      if key not in kept:
        raise jax.errors.JaxRuntimeError('NOT_FOUND')
      return kept[key]

    client = types.SimpleNamespace(
      key_value_set=put,
      key_value_try_get=get,
      key_value_dir_get=lambda key: [k for k in kept if k.startswith(key)],
    )
    self.enter_context(mock.patch.object(distributed, 'client', lambda: client))
    return kept

  def left(self, *, first: bool, status: int) -> tuple[int, str]:
    """The status and the line that a process leaves with."""
    self.several(first=first)
    self.enter_context(mock.patch.object(endings.time, 'sleep'))
    self.enter_context(mock.patch.object(jax, 'process_count', return_value=1))
    errors = self.enter_context(mock.patch('sys.stderr', io.StringIO()))
    with mock.patch.object(endings.os, '_exit') as end:
      endings.leave(status, 'error: mine')
    end.assert_called_once()
    return end.call_args.args[0], errors.getvalue()

  @parameterized.parameters(True, False)
  def test_a_process_leaves_word_and_not_without_it(self, first):
    kept = self.store()
    self.assertEqual(self.left(first=first, status=2), (2, 'error: mine\n'))
    self.assertEqual(endings.announced(), (0, 2, 'error: mine'))
    self.assertEqual('deepseek_jax/left/0' in kept, not first)

  @parameterized.parameters(79, 2)
  def test_the_first_cause_is_the_cause_of_all(self, status):
    self.store()['deepseek_jax/end'] = '[3, 2, "error: no such file"]'
    got = self.left(first=False, status=status)
    self.assertEqual(got, (2, 'error: no such file (told by process 3)\n'))

  def test_what_two_find_alike_each_says_by_itself(self):
    self.store()['deepseek_jax/end'] = '[3, 2, "error: mine"]'
    self.assertEqual(self.left(first=False, status=2), (2, 'error: mine\n'))

  def test_a_coordinator_that_is_gone_keeps_nobody(self):
    gone = mock.Mock(side_effect=jax.errors.JaxRuntimeError('UNAVAILABLE'))
    client = types.SimpleNamespace(key_value_set=gone, key_value_try_get=gone)
    self.enter_context(mock.patch.object(distributed, 'client', lambda: client))
    self.assertEqual(self.left(first=False, status=79), (79, 'error: mine\n'))

  def test_text_of_the_first_comes_to_all(self):
    kept = {}
    client = types.SimpleNamespace(
      key_value_set=kept.__setitem__,
      blocking_key_value_get=lambda key, wait: next(iter(kept.values())),
    )
    self.enter_context(mock.patch.object(distributed, 'client', lambda: client))
    self.assertEqual(distributed.text_from_first('alone'), 'alone')
    self.assertEqual(kept, {})
    self.several(first=True)
    self.assertEqual(distributed.text_from_first('mine'), 'mine')
    self.several(first=False)
    self.assertEqual(distributed.text_from_first('other'), 'mine')


class _Cut(placement.Placement):
  """A placement of this process's devices at given rows."""

  def __init__(self, shards, spans):
    mesh = types.SimpleNamespace(shape={'data': shards})
    super().__init__(mesh)
    object.__setattr__(self, 'spans', spans)

  @property
  def cut(self):
    where = {n: (slice(*span),) for n, span in enumerate(self.spans)}
    return types.SimpleNamespace(
      addressable_devices_indices_map=lambda shape: where
    )


class RowsTest(parameterized.TestCase):
  @parameterized.parameters(
    (4, [(0, 2), (2, 4)], (0, 2)),  # two of four devices
    (4, [(4, 6), (6, 8)], (1, 2)),
    (4, [(6, 8)], (3, 4)),
    (4, [(2, 4), (4, 6)], (0, 1)),  # neighbours that no half holds
    (2, [(0, 4), (0, 4)], (0, 2)),  # two devices that share rows
    (1, [(None, None)], (0, 1)),
  )
  def test_a_process_reads_the_smallest_block_of_its_rows(
    self, shards, spans, want
  ):
    self.assertEqual(_Cut(shards, spans).block(8), want)

  def test_a_batch_that_devices_cannot_share_is_refused(self):
    with self.assertRaisesRegex(
      InputError, '6 sequences cannot be shared by 4'
    ):
      _Cut(4, [(0, 2)]).block(6)

  def test_without_a_mesh_everything_stays_as_it_is(self):
    where = placement.choose()
    self.assertIsNone(where.mesh)
    self.assertEqual(where.block(5), (0, 1))
    rows = {'tokens': np.zeros((5, 2), np.int32)}
    self.assertIs(where.batch(rows, 5), rows)

  def test_a_batch_over_a_mesh_is_the_rows_that_were_read(self):
    where = placement.over_all_devices()
    rows = {'tokens': np.arange(12, dtype=np.int32).reshape(4, 3)}
    batch = where.batch(rows, 4)
    np.testing.assert_array_equal(batch['tokens'], rows['tokens'])
    self.assertEqual(batch['tokens'].sharding, where.cut)


if __name__ == '__main__':
  absltest.main()
