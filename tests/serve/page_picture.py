"""Takes a picture of the chat page of a server that runs.

python -m tests.serve.page_picture http://127.0.0.1:8000 page.png 'def main('
"""

import sys

from tests.serve import page_run


def main(url, path, text):
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=page_run.browser(), args=['--no-sandbox']
    )
    page = browser.new_page(viewport={'width': 900, 'height': 620})
    page.goto(url)
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
    page.screenshot(path=path)
    browser.close()


if __name__ == '__main__':
  main(*sys.argv[1:])
