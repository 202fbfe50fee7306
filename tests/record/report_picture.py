"""Takes a picture of a report: light on a desktop, dark on a phone.

python -m tests.record.report_picture runs/demo demo-report.png
"""

import sys
from pathlib import Path

from tests import pictures
from tests.serve import page_run

_HEIGHT = 1500
_VIEWS = (('light', 900, None), ('dark', 390, '#experts'))


def main(run, path):
  from playwright.sync_api import sync_playwright

  shots = []
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=page_run.browser(), args=['--no-sandbox']
    )
    for scheme, width, place in _VIEWS:
      page = browser.new_page(
        viewport={'width': width, 'height': _HEIGHT},
        color_scheme=scheme,
        reduced_motion='reduce',
      )
      page.goto(Path(run, 'report.html').absolute().as_uri())
      if place:
        page.locator(place).evaluate('node => node.scrollIntoView()')
      shots.append(page.screenshot())
    browser.close()
  pictures.beside(shots, path)


if __name__ == '__main__':
  main(*sys.argv[1:])
