"""--change=FIELD=VALUE of a recipe."""

from absl.testing import absltest, parameterized

from deepseek_jax.cli import changes
from deepseek_jax.config_changes import changed
from deepseek_jax.errors import InputError
from deepseek_jax.posttrain.r1_recipe import R1Recipe


class ChangesTest(parameterized.TestCase):
  def test_values_are_read_as_python_reads_them(self):
    given = ['rounds=7', 'rl_rate = 1e-3', "model.layout=((('dense',), 2),)"]
    found = changes.parsed(given, {'seed': 4})
    made = changed(R1Recipe(), found)
    self.assertEqual((made.rounds, made.rl_rate, made.seed), (7, 1e-3, 4))
    self.assertEqual(made.model.layout, ((('dense',), 2),))

  @parameterized.parameters(
    (['rounds'], 'write field=value'),
    (['=3'], 'write field=value'),
    (['rounds='], 'write field=value'),
    (['rounds=1', 'rounds=2'], 'rounds is given twice'),
    (['seed=3'], 'has a flag of its own; give --seed='),
  )
  def test_what_says_nothing_is_refused(self, given, message):
    with self.assertRaisesRegex(InputError, message):
      changes.parsed(given, {'seed': 0})

  @parameterized.parameters(
    (['round=7'], 'round'),
    (['rounds=many'], 'rounds'),
    (['rounds=0'], 'rounds = 0'),
    (['heldout=0.0'], 'heldout = 0.0: must lie in'),
    (['rl_rate=nan'], 'rl_rate'),
  )
  def test_what_a_recipe_can_not_be_names_the_field(self, given, message):
    with self.assertRaisesRegex(InputError, message):
      changed(R1Recipe(), changes.parsed(given, {}))


if __name__ == '__main__':
  absltest.main()
