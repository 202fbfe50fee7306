"""Collectives are read from a program's text as they would run."""

from absl.testing import absltest, parameterized

from deepseek_jax.plan.compiled_collectives import (
  Array,
  Collective,
  collectives,
  totals,
)

TEXT = """HloModule jit_f, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %a2a = (f8e4m3fn[2,8]{1,0}, f8e4m3fn[2,8]{1,0}) all-to-all(%x, %y), \
replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/exchange"}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

%outer (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %w = (s32[], bf16[4,8]{1,0}) while(%p), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"5"}}
  %perm = u32[7]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%left (p: f32[3]) -> f32[3] {
  ROOT %g = f32[12]{0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}
}

%right (p: f32[3]) -> f32[3] {
  ROOT %r = f32[3]{0} add(%p, %p)
}

ENTRY %main (x: f32[16,8]) -> f32[] {
  %loop = (s32[], bf16[4,8]{1,0}) while(%p), condition=%c, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
  %ar = (f32[10]{0}, /*index=1*/pred[6]{0}) all-reduce(%a, %b), \
replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %rs = f32[5]{0} reduce-scatter(%a), replica_groups=[1,4]<=[4], to_apply=%add
  %b = f32[12]{0} conditional(%k, %x, %y), branch_computations={%left, %right}
  %alone = f32[9]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3}}
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]
  %d = f32[8]{0} all-gather-done(%s)
  %m = f32[6]{0} all-gather(%x), replica_groups=mesh['axis_0'=4,'axis_1'=2] \
{'axis_1'}, dimensions={0}
  %n = f32[4]{0} all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] \
{'a':(1)2,'b'}, to_apply=%add
}
"""


class CollectivesTest(parameterized.TestCase):
  def test_kinds_sizes_groups_and_loops(self):
    got = collectives(TEXT, 4)
    want = [
      ('all-to-all', 32, 2, 15, False),
      ('collective-permute', 28, 4, 3, False),
      ('all-reduce', 46, 2, 1, False),
      ('reduce-scatter', 80, 4, 1, False),
      ('all-gather', 48, 4, 1, True),
      ('all-gather', 32, 4, 1, False),
      ('all-gather', 24, 2, 1, False),
      ('all-reduce', 16, 4, 1, False),
    ]
    read = [(c.kind, c.bytes, c.devices, c.times, c.maybe) for c in got]
    self.assertEqual(read, want)
    self.assertEqual(got[0].source, 'jit(f)/exchange')
    self.assertEqual(got[0].arrays, (Array('f8e4m3fn', (2, 8)),) * 2)
    self.assertEqual(got[2].arrays[1], Array('pred', (6,)))

  def test_a_loop_of_unknown_length_counts_once_and_says_so(self):
    text = TEXT.replace('"known_trip_count":{"n":"5"}', '')
    first = collectives(text, 4)[0]
    self.assertEqual((first.times, first.loop), (3, True))

  @parameterized.parameters(
    ('all-gather', 1000, 4, 750),
    ('reduce-scatter', 1000, 4, 750),
    ('all-to-all', 1000, 4, 750),
    ('all-reduce', 1000, 4, 1500),
    ('collective-permute', 1000, 4, 1000),
  )
  def test_bytes_sent_are_a_rings(self, kind, size, devices, want):
    part = devices if kind == 'reduce-scatter' else 1
    array = Array('u8', (size // part,))
    made = Collective(kind, (array,), devices, times=2)
    self.assertEqual((made.bytes, made.sent), (size, 2 * want))

  def test_totals_by_kind(self):
    found = totals(collectives(TEXT, 4))
    self.assertEqual(found['all-to-all'], (15, 15 * 16))
    self.assertEqual(found['all-gather'], (3, 36 + 24 + 12))
    self.assertNotIn('ragged-all-to-all', found)


if __name__ == '__main__':
  absltest.main()
