"""Templates for clusters: they parse, and restart what deserves it."""

import os
import pathlib
import subprocess
import tempfile

import yaml
from absl.testing import absltest, parameterized

from deepseek_jax import errors
from deepseek_jax.parallel.processes import find_cluster

ROOT = pathlib.Path(__file__).parents[1]
BATCH = ROOT / 'launch' / 'slurm.sbatch'
ALL = (0, *errors.DO_NOT_START_AGAIN, *errors.START_AGAIN)


class SlurmTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def _command(self, name: str, body: str):
    path = self.folder / name
    path.write_text(f'#!/bin/bash\n{body}\n')
    path.chmod(0o755)

  def _run(self, srun: str, *, restarts=0, arguments=None, **environment):
    """The batch file with commands of SLURM that write down their arguments."""
    self._command('srun', f'echo srun "$@" >> {self.folder}/calls\n{srun}')
    self._command('scontrol', f'echo scontrol "$@" >> {self.folder}/calls')
    if arguments is None:
      arguments = ['--config=a.py', f'--workdir={self.folder}/run']
    done = subprocess.run(
      ['bash', BATCH, *arguments],
      env={
        'PATH': f'{self.folder}:{os.environ["PATH"]}',
        'SLURM_JOB_ID': '42',
        'SLURM_RESTART_COUNT': str(restarts),
        **environment,
      },
      capture_output=True,
      text=True,
      check=False,
    )
    calls = self.folder / 'calls'
    said = calls.read_text().splitlines() if calls.exists() else []
    return done, said, 'scontrol requeue 42' in said

  def test_is_a_batch_file(self):
    subprocess.run(['bash', '-n', BATCH], check=True)
    lines = BATCH.read_text().splitlines()
    self.assertEqual(lines[0], '#!/bin/bash')
    options = [l.removeprefix('#SBATCH ') for l in lines if '#SBATCH' in l]
    for option in ('--requeue', '--signal=TERM@180', '--open-mode=append'):
      self.assertIn(option, options)
    # Options behind the first command are not read.
    first = next(n for n, l in enumerate(lines) if l and l[0] != '#')
    self.assertNotIn('#SBATCH', '\n'.join(lines[first:]))

  @parameterized.parameters(*ALL)
  def test_requeues_the_codes_that_deserve_it(self, status):
    done, calls, again = self._run(f'exit {status}')
    self.assertEqual(done.returncode, status, msg=done.stderr)
    self.assertEqual(again, status in errors.START_AGAIN)
    self.assertEndsWith(calls[0], f'--config=a.py --workdir={self.folder}/run')

  @parameterized.parameters(*errors.START_AGAIN)
  def test_a_fault_that_comes_back_without_progress_ends(self, status):
    preempted = status == 77
    _, _, again = self._run(f'exit {status}', restarts=3)
    self.assertEqual(again, preempted)
    save = f'mkdir -p {self.folder}/run/checkpoints/7; exit {status}'
    _, _, again = self._run(save, restarts=3)
    self.assertTrue(again)

  def test_an_unfinished_save_is_no_progress(self):
    unfinished = f'{self.folder}/run/checkpoints/7.orbax-checkpoint-tmp'
    _, _, again = self._run(f'mkdir -p {unfinished}; exit 79', restarts=3)
    self.assertFalse(again)

  def test_processes_end_by_themselves_before_they_are_ended(self):
    # srun reports the highest status: of those that it kills, that is theirs.
    _, calls, _ = self._run('exit 0')
    self.assertIn('--kill-on-bad-exit=0 --wait=120', calls[0])

  def test_any_launcher_may_run(self):
    _, calls, _ = self._run('exit 0')
    self.assertIn('python -m experiments.pretrain ', calls[0])
    _, calls, _ = self._run('exit 0', LAUNCHER='grpo')
    self.assertIn('python -m experiments.grpo ', calls[-1])

  def test_no_folder_is_bad_input(self):
    done, calls, _ = self._run('exit 0', arguments=['--config=a.py'])
    self.assertEqual((done.returncode, calls), (2, []))
    self.assertIn('--workdir=... is missing', done.stderr)


class JobSetTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    text = (ROOT / 'launch' / 'jobset.yaml').read_text()
    self.spec = yaml.safe_load(text)['spec']
    (self.job,) = self.spec['replicatedJobs']
    self.template = self.job['template']['spec']
    self.pod = self.template['template']['spec']
    (self.container,) = self.pod['containers']

  def test_codes_that_would_come_again_fail_it_all_others_restart_it(self):
    (rule,) = self.template['podFailurePolicy']['rules']
    self.assertEqual(rule['action'], 'FailJob')
    codes = rule['onExitCodes']
    self.assertEqual(codes['operator'], 'In')
    self.assertEqual(codes['values'], sorted(errors.DO_NOT_START_AGAIN))
    self.assertEqual(codes['containerName'], self.container['name'])
    # Any other failed pod fails the job, and that restarts the JobSet.
    self.assertEqual(self.template['backoffLimit'], 0)
    self.assertEqual(self.pod['restartPolicy'], 'Never')
    (rule,) = self.spec['failurePolicy']['rules']
    self.assertEqual(rule['action'], 'FailJobSet')
    self.assertEqual(rule['onJobFailureReasons'], ['PodFailurePolicy'])
    self.assertGreater(self.spec['failurePolicy']['maxRestarts'], 0)

  def test_pods_find_each_other(self):
    values = {e['name']: e.get('value') for e in self.container['env']}
    pods = self.template['parallelism']
    self.assertEqual(self.template['completions'], pods)
    self.assertEqual(self.template['completionMode'], 'Indexed')
    host = values['DSJ_COORDINATOR'].replace('$(JOBSET)', 'mine')
    environment = {
      'DSJ_COORDINATOR': host,
      'DSJ_PROCESSES': values['DSJ_PROCESSES'],
      'DSJ_PROCESS': str(pods - 1),
      'KUBERNETES_SERVICE_HOST': '10.0.0.1',
      'JOB_COMPLETION_INDEX': '1',
    }
    found = find_cluster(environment=environment)
    self.assertEqual((found.found_by, found.count), ('environment', pods))
    # JobSet calls pods <set>-<job>-<replica>-<pod>, in the subdomain <set>.
    name, port = found.coordinator.split(':')
    self.assertEqual(name, f'mine-{self.job["name"]}-0-0.mine')
    self.assertEqual(int(port), self.container['ports'][0]['containerPort'])
    order = [e['name'] for e in self.container['env']]
    # A variable is known to those behind it alone.
    self.assertLess(order.index('JOBSET'), order.index('DSJ_COORDINATOR'))

  def test_the_signal_reaches_python_in_time(self):
    self.assertEqual(self.container['command'][0], 'python')
    self.assertGreaterEqual(self.pod['terminationGracePeriodSeconds'], 180)


class CodesTest(absltest.TestCase):
  def test_every_error_has_its_code_in_one_list(self):
    kinds = (
      errors.InputError,
      errors.RunAborted,
      errors.Preempted,
      errors.PeerLost,
      errors.Terminated,
    )
    again = {kind.__name__: kind.status in errors.START_AGAIN for kind in kinds}
    want = {'InputError': 0, 'RunAborted': 0, 'Preempted': 1, 'PeerLost': 1}
    want['Terminated'] = 1
    self.assertEqual(again, want)
    self.assertEmpty(set(errors.START_AGAIN) & set(errors.DO_NOT_START_AGAIN))


if __name__ == '__main__':
  absltest.main()
