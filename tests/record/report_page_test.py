"""Reports and comparisons in headless Chromium; see tests/serve/page_run."""

import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax.record import comparison, flight
from deepseek_jax.record.report import compared, page
from tests.record import fake_run
from tests.serve import page_run

# Where to put pictures of the pages; none are made without it.
_PICTURES = os.environ.get('PAGE_PICTURES')
_PHONE = {'width': 360, 'height': 740}
_SCREENS = (
  _PHONE,
  {'width': 390, 'height': 844},
  {'width': 820, 'height': 1180},
  {'width': 1440, 'height': 900},
)
# Every text that is seen: its words, colours as [r, g, b, a], height, place.
_TEXTS = """() => {
  const parse = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    return parts.length < 4 ? [...parts, 1] : parts;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color[3] > 0) return color;
    }
    return [255, 255, 255, 1];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, up = node.parentElement;
    const seen = up.checkVisibility({visibilityProperty: true});
    if (!node.data.trim() || !seen) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getClientRects()[0];
    if (!box) continue;
    const style = getComputedStyle(up);
    // The font's size as it is seen: text in an SVG is scaled with it.
    const scale = up.getScreenCTM ? up.getScreenCTM().a : 1;
    found.push({
      text: node.data.trim().slice(0, 40), color: parse(style.color),
      ground: ground(up), size: parseFloat(style.fontSize) * scale,
      height: box.height, left: box.left, right: box.right,
    });
  }
  return found;
}"""
# Numbers beside charts that lie over each other.
_TOUCHING = """() => {
  const found = [];
  for (const axis of document.querySelectorAll('.across, .up')) {
    const boxes = [...axis.querySelectorAll('span')]
        .filter((node) => node.checkVisibility({visibilityProperty: true}))
        .map((node) => [node.textContent, node.getBoundingClientRect()]);
    for (const [a, one] of boxes) {
      for (const [b, two] of boxes) {
        const apart = one.left >= two.right || two.left >= one.right ||
            one.top + 2 >= two.bottom || two.top + 2 >= one.bottom;
        if (one !== two && !apart) found.push([a, b]);
      }
    }
  }
  return found;
}"""


def contrast(one, other):
  """Returns the contrast of two opaque colours, as WCAG 2 defines it."""

  def light(color):
    shares = np.array(color[:3]) / 255
    linear = np.where(
      shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4
    )
    return float(linear @ [0.2126, 0.7152, 0.0722])

  low, high = sorted((light(one), light(other)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
class ReportPageTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.browser = page_run.launched(cls)
    folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.run_, other = folder / 'run', folder / 'other'
    for path, scale in ((cls.run_, 1.0), (other, 1.3)):
      path.mkdir()
      fake_run.write_run(path, 70, scale, together=True)
    fake_run.write_report(cls.run_)
    over = page.draw(
      cls.run_,
      page.read_told(cls.run_),
      beside={fake_run.HOSTILE: other},
      out=folder / 'over.html',
    )
    one = folder / 'one'
    one.mkdir()
    fake_run.write_run(one, 1)
    cls.pages = {
      'one': fake_run.write_report(one),
      'report': cls.run_ / 'report.html',
      'over': over,
      'compare': cls._comparison(folder),
    }

  @classmethod
  def _comparison(cls, folder):
    """Writes the comparison of two arms of two seeds."""
    made = []
    for arm in ('a', fake_run.HOSTILE):
      for seed in (0, 1):
        path = folder / f'arm{len(made)}'
        path.mkdir()
        scale = 1 + 0.1 * seed + 0.3 * (arm != 'a')
        fake_run.write_scalars(path, 60, scale)
        config = {'kind': arm, 'seed': seed}
        (path / 'config.json').write_text(json.dumps(config))
        made.append(comparison.read(path))
    out = folder / 'compare.html'
    title = 'Comparison ' + fake_run.HOSTILE
    return compared.write(out, comparison.arms(made), 'loss', title)

  def open(self, name='report', **context):
    """Returns a page; what it told and asked for is in self."""
    window = self.browser.new_context(**context)
    self.addCleanup(window.close)
    opened = window.new_page()
    opened.set_default_timeout(10_000)
    self.told, self.asked = [], []
    opened.on('pageerror', lambda error: self.told.append(str(error)))
    opened.on('console', lambda m: self.told.append(m.text))
    opened.on('request', lambda r: self.asked.append(r.url[:40]))
    opened.goto(self.pages[name].as_uri())
    return opened

  def picture(self, opened, name, **options):
    if _PICTURES:
      opened.screenshot(path=os.path.join(_PICTURES, f'{name}.png'), **options)

  def area(self, opened, title, n=0):
    chart = opened.locator('.chart:visible', has=opened.get_by_text(title))
    return chart.nth(n).locator('.area')

  @parameterized.product(
    screen=_SCREENS,
    scheme=('light', 'dark'),
    name=('report', 'over', 'compare'),
  )
  def test_it_is_read_on_any_screen(self, screen, scheme, name):
    opened = self.open(name, viewport=screen, color_scheme=scheme)
    opened.evaluate(
      'for (const d of document.querySelectorAll("details")) d.open = true'
    )
    wide = opened.evaluate('document.documentElement.scrollWidth')
    self.assertLessEqual(wide, screen['width'])
    texts = opened.evaluate(_TEXTS)
    self.assertGreater(len(texts), 50)
    for text in texts:
      self.assertGreaterEqual(text['size'], 11.9, text)
      self.assertGreaterEqual(text['height'], 11, text)
      self.assertEqual(text['ground'][3], 1, text)
      ratio = contrast(text['color'], text['ground'])
      self.assertGreaterEqual(ratio, 4.5, text)
    self.assertEqual(opened.evaluate(_TOUCHING), [])
    paper = opened.evaluate('getComputedStyle(document.body).backgroundColor')
    dark = int(re.match(r'rgb\((\d+)', paper)[1]) < 60
    self.assertEqual(dark, scheme == 'dark')
    self.picture(opened, f'{name}-{screen["width"]}-{scheme}', full_page=True)

  @parameterized.parameters('light', 'dark')
  def test_lines_stand_out_from_the_paper(self, scheme):
    opened = self.open(color_scheme=scheme)
    colors = opened.evaluate("""() => {
      const probe = document.createElement('i');
      document.body.append(probe);
      return ['--paper', ...Array.from({length: 8}, (_, n) => `--c${n}`),
          '--axis', '--accent', '--wrong'].map((name) => {
        probe.style.color = `var(${name})`;
        return getComputedStyle(probe).color.match(/\\d+/g).map(Number);
      });
    }""")
    for color in colors[1:]:
      self.assertGreaterEqual(contrast(color, colors[0]), 3, color)

  def test_one_step_is_shown_by_dots(self):
    opened = self.open('one')
    dots = opened.locator('.area:visible path.dots').all()
    self.assertGreater(len(dots), 3 * 8)
    for dot in dots:
      width = dot.evaluate('node => getComputedStyle(node).strokeWidth')
      self.assertEqual(width, '5px')
    self.assertEqual(self.told, [])

  @parameterized.parameters('report', 'over', 'compare')
  def test_what_others_wrote_is_text(self, name):
    opened = self.open(name)
    self.assertEqual(opened.locator('body img').count(), 0)
    self.assertIn(fake_run.HOSTILE, opened.inner_text('h1'))
    for area in opened.locator('.area:visible').all():
      area.hover()
    self.assertEqual(opened.locator('body img').count(), 0)
    self.assertIsNone(opened.evaluate('window.hit ?? null'))
    self.assertEqual(self.told, [])
    self.assertLen([u for u in self.asked if not u.startswith('data:')], 1)

  def test_a_script_that_came_in_would_not_run(self):
    opened = self.open()
    opened.evaluate("""() => {
      const node = document.createElement('script');
      node.textContent = 'window.hit = 1';
      document.body.append(node);
      const text = '<b onclick="window.hit=1">';
      document.body.insertAdjacentHTML('beforeend', text);
      document.body.lastElementChild.click();
    }""")
    self.assertIsNone(opened.evaluate('window.hit ?? null'))
    self.assertIn('Content Security Policy', ' '.join(self.told))

  def test_a_pointer_reads_values(self):
    opened = self.open('over')
    area = self.area(opened, 'Loss, nats per token')
    box = area.bounding_box()
    area.hover(position={'x': 0.5 * box['width'], 'y': 5})
    text = opened.inner_text('#tip')
    step = int(re.match(r'step (\d+)', text)[1])
    self.assertBetween(step, 34, 37)
    self.assertIn(f'run: {5 / step:.4g}', text)
    self.assertIn(f'{fake_run.HOSTILE}: {6.5 / step:.4g}', text)
    self.assertEqual(area.locator('.spot').count(), 1)
    opened.hover('h2')
    self.assertFalse(opened.is_visible('#tip'))

  def test_a_finger_reads_values(self):
    opened = self.open(viewport=_PHONE, has_touch=True, is_mobile=True)
    area = self.area(opened, 'layer 2')  # of the load over time
    area.scroll_into_view_if_needed()
    area.tap()
    text = opened.inner_text('#tip')
    found = re.match(
      r'expert (\d+), steps (\d+)–(\d+)\n+load / even share ([\d.]+)', text
    )
    run = flight.load(self.run_ / 'routing.npz')
    n = run.last.tolist().index(int(found[3]))
    load = run.arrays['load'][n, 1]
    want = load[int(found[1])] / load.mean()
    self.assertAlmostEqual(float(found[4]), want, places=3)
    box = opened.locator('#tip').bounding_box()
    self.assertGreaterEqual(box['x'], 0)
    self.assertLessEqual(box['x'] + box['width'], 360)
    self.picture(opened, 'tip-phone')
    opened.locator('figcaption').first.tap()
    self.assertFalse(opened.is_visible('#tip'))

  def test_keys_read_every_chart(self):
    opened = self.open()
    opened.keyboard.press('Tab')
    self.assertEqual(opened.evaluate('document.activeElement.tagName'), 'A')
    read = lambda: opened.evaluate(
      'document.activeElement.getAttribute("aria-valuetext")'
    )
    area = self.area(opened, 'Loss, nats per token')
    while not area.evaluate('node => node === document.activeElement'):
      opened.keyboard.press('Tab')
    self.assertEqual(read(), 'step 70, training: 0.07143, validation: 0.07857')
    opened.keyboard.press('ArrowLeft')
    self.assertIn('step 69, training: 0.07246', read())
    opened.keyboard.press('Home')
    self.assertIn('step 1, training: 5', read())
    self.assertEqual(opened.inner_text('#tip').split('\n')[0], 'step 1')
    opened.keyboard.press('ArrowDown')
    self.assertIn('step 70', read())  # where validation has a value
    opened.keyboard.press('Escape')
    self.assertFalse(opened.is_visible('#tip'))
    opened.keyboard.press('Tab')
    self.assertIn('step 70', read())
    # One stop for a figure; its other charts by Page Down.
    seen = [read()]
    for _ in range(2):
      opened.keyboard.press('PageDown')
      seen.append(read())
    self.assertLen({*seen}, 3)
    opened.keyboard.press('PageUp')
    self.assertEqual(read(), seen[1])
    every = opened.locator('.area').count()
    self.assertEqual(opened.locator('.area[role=slider]').count(), every)
    stops = opened.locator('.area[tabindex="0"]:visible').count()
    figures = opened.locator('figure:has(.area):visible').count()
    self.assertEqual(stops, figures)

  def test_keys_move_the_inspector(self):
    opened = self.open()
    run = flight.load(self.run_ / 'routing.npz')
    load = run.arrays['load'] / run.arrays['load'].mean(-1, keepdims=True)
    canvas = opened.locator('#plots canvas').first
    canvas.focus()
    opened.keyboard.press('Home')
    for _ in range(9):
      opened.keyboard.press('ArrowUp')
    opened.keyboard.press('ArrowDown')
    opened.keyboard.press('ArrowDown')
    opened.keyboard.press('PageDown')
    self.assertEqual(opened.input_value('#layer'), '1')
    self.assertEqual(opened.input_value('#expert'), '2')
    text = opened.inner_text('#reading')
    self.assertIn(f'expert 2 · steps {run.first[0]}–{run.last[0]}', text)
    self.assertIn(f'load {load[0, 1, 2]:.4g}'[:9], text)
    self.assertIn('layer 2, expert 2', canvas.get_attribute('aria-valuetext'))
    opened.keyboard.press('ArrowRight')
    self.assertIn(f'steps {run.first[1]}–', opened.inner_text('#reading'))

  def test_without_a_script_it_is_read_and_folds(self):
    opened = self.open(java_script_enabled=False)
    for name in ('#inspector', '.hint', '#tip'):
      self.assertFalse(opened.locator(name).first.is_visible(), name)
    shown = opened.locator('.linear .area:visible').count()
    self.assertGreater(shown, 3)
    opened.check('#log-x')
    self.assertEqual(opened.locator('.linear .area:visible').count(), 0)
    self.assertEqual(opened.locator('.log .area:visible').count(), shown)
    opened.click('summary >> nth=0')
    self.assertTrue(opened.locator('.scrolls table').first.is_visible())
    self.picture(opened, 'no-script', full_page=True)

  def test_on_paper_it_is_white_and_whole(self):
    opened = self.open(color_scheme='dark')
    opened.emulate_media(media='print', color_scheme='dark')
    paper = opened.evaluate('getComputedStyle(document.body).backgroundColor')
    self.assertEqual(paper, 'rgb(255, 255, 255)')
    for text in opened.evaluate(_TEXTS):
      self.assertGreaterEqual(contrast(text['color'], text['ground']), 4.5)
    for name in ('#inspector', 'nav', '.hint', '.choice', '.log'):
      self.assertFalse(opened.locator(name).first.is_visible(), name)
    self.assertTrue(opened.locator('pre.config').is_visible())
    made = opened.pdf(path=_PICTURES and os.path.join(_PICTURES, 'report.pdf'))
    self.assertGreater(len(re.findall(rb'/Type /Page\b', made)), 2)

  def test_nothing_moves_for_those_who_ask(self):
    for motion, want in (('reduce', 'auto'), ('no-preference', 'smooth')):
      opened = self.open(reduced_motion=motion)
      got = opened.evaluate(
        'getComputedStyle(document.documentElement).scrollBehavior'
      )
      self.assertEqual(got, want)
    moving = opened.evaluate("""() => [...document.querySelectorAll('*')]
        .map((node) => getComputedStyle(node))
        .filter((style) => style.animationName !== 'none' ||
            style.transitionDuration !== '0s')
        .length""")
    self.assertEqual(moving, 0)

  def test_the_contents_lead_somewhere(self):
    opened = self.open(reduced_motion='reduce', viewport=_PHONE)
    for link in opened.locator('nav a').all():
      self.assertGreaterEqual(link.bounding_box()['height'], 32)
      link.click()
      id_ = link.get_attribute('href')
      self.assertTrue(
        opened.locator(id_).evaluate(
          'n => n.getBoundingClientRect().top < innerHeight'
        )
      )


if __name__ == '__main__':
  absltest.main()
