"""Bugs of attention maps and pictures: what is shown is not what is there."""

from tests.mutants.mutant import Mutant

_MAPS = 'deepseek_jax/model/attention_maps.py'
_MAPS_TEST = 'tests/model/attention_maps_test.py'
_SHOWN = 'deepseek_jax/record/shown.py'
_SHOWN_TEST = 'tests/record/shown_test.py'

MUTANTS = (
  Mutant(
    'map_without_the_sink',
    _MAPS,
    'jnp.concatenate([seen, sunk], axis=-1)[:, None]',
    'jnp.concatenate([seen, ~sunk], axis=-1)[:, None]',
    (f'{_MAPS_TEST}::window_entries_and_sinks',),
    'attention that goes nowhere is drawn on tokens',
  ),
  Mutant(
    'map_of_neighbouring_groups',
    _MAPS,
    'k = jnp.repeat(k, cfg.heads // cfg.kv_heads, axis=2)',
    'k = jnp.tile(k, (1, 1, cfg.heads // cfg.kv_heads, 1))',
    (f'{_MAPS_TEST}::shares_times_values',),
    'query heads are drawn with the keys of other groups',
  ),
  Mutant(
    'map_of_the_first_repeat',
    _MAPS,
    'jax.tree.map(lambda a, r=layer.repeat: a[r], stack)',
    'jax.tree.map(lambda a: a[0], stack)',
    (f'{_MAPS_TEST}::layers_are_in_order',),
    'stacked layers are all drawn as the first of them',
  ),
  Mutant(
    'map_of_what_is_picked_among_the_future',
    _MAPS,
    'picked = best(scores, seen, min(top_k, seen.shape[-1]))',
    'picked = best(scores, seen | True, min(top_k, seen.shape[-1]))',
    (f'{_MAPS_TEST}::as_many_are_chosen',),
    'the recall of an indexer counts tokens that a query may not see',
  ),
  Mutant(
    'text_of_a_picture_ends_its_attribute',
    _SHOWN,
    'said = html.escape(alt)',
    'said = alt',
    (f'{_SHOWN_TEST}::a_text_ends_no_attribute',),
    'a quotation mark in a text cuts it, and what follows is read as HTML',
  ),
)
