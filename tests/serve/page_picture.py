"""Takes a picture of the chat page of a server that runs.

It answers one text twice: light on a desktop, dark on a phone.

python -m tests.serve.page_picture http://127.0.0.1:8000 page.png 'def main('
"""

import sys

from tests import pictures
from tests.serve import page_run

_HEIGHT = 720
_VIEWS = (('light', 860), ('dark', 390))


def main(url, path, text):
  from playwright.sync_api import sync_playwright

  shots = []
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=page_run.browser(), args=['--no-sandbox']
    )
    for scheme, width in _VIEWS:
      page = browser.new_page(
        viewport={'width': width, 'height': _HEIGHT}, color_scheme=scheme
      )
      page.goto(url)
      shots.append(answered(page, text))
    browser.close()
  pictures.beside(shots, path)


def answered(page, text):
  """Returns a picture of the page with the answer to a text."""
  page.wait_for_selector('#state:has-text("of context")')
  page.keyboard.press('Alt+s')
  page.fill('#max_tokens', '120')
  page.fill('#seed', '1')
  page.keyboard.press('Alt+s')
  page.fill('#input', text)
  page.press('#input', 'Enter')
  page.wait_for_selector('.experts, .facts button', timeout=300_000)
  if page.locator('.experts').count():
    page.click('.experts summary')
  return page.screenshot()


if __name__ == '__main__':
  main(*sys.argv[1:])
