"""The chat page in headless Chromium; see `page_run`."""

import os
import re
import time

import pytest
from absl.testing import absltest

from tests.serve import page_run
from tests.serve import served as servers
from tests.serve.fake_engine import FakeEngine

# Where to put pictures of the page; none are made without it.
_PICTURES = os.environ.get('PAGE_PICTURES')
_EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'


@pytest.mark.slow
class PageTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.browser = page_run.launched(cls)
    cls.tokenizer = servers.deepseek_tokenizer()

  def says(self, engine, text):
    ids = self.tokenizer.encode(text, special=True)
    engine.script = lambda request, index: [*ids, self.tokenizer.eos_id]

  def serve(self, pace=0.0, **config):
    engine = FakeEngine(
      self.tokenizer, context=4096, stop=self.tokenizer.eos_id
    )
    engine.pace = pace
    served = servers.served_chat(self.tokenizer)
    server, _ = self.enter_context(servers.running(served, engine, **config))
    return server, engine

  def open(self, server, **context):
    """Returns the page, which must not tell of an error in the end."""
    window = self.browser.new_context(**context)
    self.addCleanup(window.close)
    page = window.new_page()
    page.set_default_timeout(10_000)
    self.told, self.asked = [], []
    page.on('pageerror', lambda error: self.told.append(str(error)))
    page.on('console', lambda m: self.told.append(m.text))
    page.on('request', lambda request: self.asked.append(request.url))
    page.goto(server.url)
    return page

  def until(self, holds):
    """Waits; the page's own policy lets no test run code in it by a text."""
    end = time.monotonic() + 10
    while not holds():
      self.assertLess(time.monotonic(), end)
      time.sleep(0.02)

  def picture(self, page, name):
    if _PICTURES:
      page.screenshot(path=os.path.join(_PICTURES, f'{name}.png'))

  def say(self, page, text):
    page.fill('#input', text)
    page.press('#input', 'Enter')
    page.wait_for_selector('#send:visible')

  def test_an_answer_comes_in_pieces_with_thoughts_folded(self):
    server, engine = self.serve(pace=0.02)
    page = self.open(server)
    self.until(lambda: page.title() == 'tiny-chat')
    self.says(engine, 'Let me think.</think>Hello 東京, é and 🎉!')
    page.fill('#input', 'Hi')
    page.press('#input', 'Enter')
    page.wait_for_selector('#stop:visible')
    lengths = set()
    while page.is_visible('#stop'):
      lengths.add(len(page.inner_text('.assistant')))
    self.assertGreater(len(lengths), 5)
    self.assertEqual(page.inner_text('.said'), 'Hello 東京, é and 🎉!')
    self.assertFalse(page.is_visible('.thought .text'))
    page.click('.thought summary')
    self.assertEqual(page.inner_text('.thought .text'), 'Let me think.')
    self.assertRegex(page.inner_text('.facts'), r'\d+ tokens · [\d.]+ tokens/s')
    self.assertIn('of 4096 tokens left', page.inner_text('#state'))
    page.click('.experts summary')
    self.assertIn(
      'busiest: layer 2, expert 3: 5 tokens', page.inner_text('.reading')
    )
    page.hover('canvas', position={'x': 2, 'y': 2})
    self.assertIn('layer 1, expert 1: 0 tokens', page.inner_text('.reading'))
    self.picture(page, 'chat')
    # The next question carries the conversation, without the thoughts.
    self.says(engine, '</think>Yes.')
    self.say(page, 'And now?')
    prompt = self.tokenizer.decode(engine.seen[-1].prompt)
    self.assertIn('Hello 東京, é and 🎉!', prompt)
    self.assertNotIn('Let me think', prompt)
    self.assertEqual(self.told, [])
    self.assertTrue(all(url.startswith(server.url) for url in self.asked))

  def test_what_a_model_writes_is_text(self):
    server, engine = self.serve()
    page = self.open(server)
    self.until(lambda: page.title() == 'tiny-chat')
    self.says(engine, f'{_EVIL}</think>{_EVIL}')
    self.say(page, _EVIL)
    self.assertEqual(page.inner_text('.said'), _EVIL)
    self.assertEqual(page.inner_text('.user .text'), _EVIL)
    self.assertEqual(page.locator('main img, main script').count(), 0)
    self.assertIsNone(page.evaluate('window.hit ?? null'))
    self.assertEqual(self.told, [])

  def test_escape_stops_and_a_new_conversation_begins(self):
    server, engine = self.serve(pace=0.02)
    page = self.open(server)
    self.until(lambda: page.title() == 'tiny-chat')
    engine.script = lambda r, i: self.tokenizer.encode(
      '</think>' + 'word ' * 900, special=True
    )
    page.fill('#input', 'Hi')
    page.press('#input', 'Enter')
    page.wait_for_selector('.said:not(:empty)')
    page.keyboard.press('Escape')
    page.wait_for_selector('#send:visible')
    self.assertIn('stopped', page.inner_text('.facts'))
    page.wait_for_timeout(300)
    self.assertFalse(engine.busy())
    page.keyboard.press('Alt+n')
    self.assertEqual(page.locator('article').count(), 0)
    page.fill('#input', 'Hi')
    page.press('#input', 'Enter')
    page.wait_for_selector('#stop:visible')
    page.click('#stop')
    page.wait_for_selector('#send:visible')
    self.assertFalse(self.told)

  def test_the_key_is_asked_for_and_kept_in_memory(self):
    server, engine = self.serve(keys=(servers.KEY,))
    page = self.open(server)
    page.wait_for_selector('#lock[open]')
    self.picture(page, 'key')
    page.keyboard.press('Escape')  # there is no way around it
    page.keyboard.press('Escape')
    page.fill('#key', 'wrong')
    page.press('#key', 'Enter')
    self.until(lambda: 'not right' in page.inner_text('#lock-note'))
    page.fill('#key', servers.KEY)
    page.press('#key', 'Enter')
    self.until(lambda: page.title() == 'tiny-chat')
    self.says(engine, '</think>Open.')
    self.say(page, 'Hi')
    self.assertEqual(page.inner_text('.said'), 'Open.')
    stored = page.evaluate(
      'JSON.stringify([{...localStorage}, {...sessionStorage},'
      ' document.cookie])'
    )
    self.assertEqual(stored, '[{},{},""]')
    self.assertNotIn(servers.KEY, page.content())
    self.assertNotIn(servers.KEY, ' '.join(self.asked))
    page.reload()
    page.wait_for_selector('#lock[open]')

  def test_settings_are_sent(self):
    server, engine = self.serve()
    page = self.open(server)
    self.until(lambda: page.title() == 'tiny-chat')
    page.keyboard.press('Alt+s')
    page.wait_for_selector('#settings:visible')
    for name, value in (
      ('system', 'Be kind.'),
      ('temperature', '0'),
      ('top_p', '0.5'),
      ('max_tokens', '7'),
      ('seed', '11'),
    ):
      page.fill(f'#{name}', value)
    page.select_option('#thinking', 'disabled')
    self.picture(page, 'settings')
    self.says(engine, 'one two three four five six')
    self.say(page, 'Hi')
    request = engine.seen[-1]
    self.assertEqual(
      (request.sampling.temperature, request.sampling.top_p), (0, 0.5)
    )
    self.assertEqual((request.max_new_tokens, request.sampling.seed), (7, 11))
    self.assertIn('Be kind.', self.tokenizer.decode(request.prompt))
    self.assertIn('cut at its length', page.inner_text('.facts'))

  def test_errors_are_told_and_the_question_is_kept(self):
    server, engine = self.serve()
    page = self.open(server)
    self.until(lambda: page.title() == 'tiny-chat')
    self.say(page, 'word ' * 4000)
    self.assertIn('shorten it', page.inner_text('.facts'))
    self.assertTrue(page.input_value('#input').startswith('word word'))
    engine.queue = 0
    self.say(page, 'Hi')
    self.assertIn('queue', page.inner_text('.facts >> nth=1'))
    engine.queue = 64
    self.says(engine, '</think>Yes.')
    self.say(page, 'Hi')
    self.assertEqual(page.inner_text('.said >> nth=2'), 'Yes.')
    prompt = self.tokenizer.decode(engine.seen[-1].prompt)
    self.assertNotIn('word word', prompt)

  def test_it_fits_a_phone_in_the_dark(self):
    server, engine = self.serve()
    page = self.open(
      server,
      viewport={'width': 360, 'height': 640},
      color_scheme='dark',
      has_touch=True,
    )
    self.until(lambda: page.title() == 'tiny-chat')
    self.says(engine, 'Hm.</think>' + 'A long answer goes on. ' * 9)
    page.fill('#input', 'Hi')
    page.tap('#send')
    page.wait_for_selector('#send:visible')
    wide = page.evaluate('document.documentElement.scrollWidth')
    self.assertLessEqual(wide, 360)
    ground = page.evaluate('getComputedStyle(document.body).backgroundColor')
    red = int(re.match(r'rgb\((\d+)', ground)[1])
    self.assertLess(red, 60)
    for name in ('#send', '#fresh', '#adjust'):
      box = page.locator(name).bounding_box()
      self.assertGreaterEqual(box['height'], 38)
      self.assertLessEqual(box['x'] + box['width'], 360)
    self.picture(page, 'phone')

  def test_a_model_without_chat_goes_on_from_a_text(self):
    server, _ = self.enter_context(servers.running(servers.served_bytes()))
    page = self.open(server)
    self.until(lambda: page.title() == 'tiny')
    self.assertFalse(page.is_visible('#system'))
    page.keyboard.press('Alt+s')
    page.fill('#temperature', '0')
    self.say(page, 'def f(')
    self.assertEqual(page.inner_text('.beginning'), 'def f(')
    self.assertEqual(page.inner_text('.said'), 'def f(')
    self.assertEqual(self.told, [])


if __name__ == '__main__':
  absltest.main()
