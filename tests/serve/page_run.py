"""Tests the pages in a real browser: python -m tests.serve.page_run.

They are the chat page, the report of a run and the comparison of runs.

Needs playwright (extra `pages`) and Chromium: that of the system, or the one
that `playwright install chromium` brings.
"""

import os
import shutil
import sys

TESTS = ('page_test.py', '../record/report_page_test.py')
NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def browser():
  """Returns the path of a browser; None for playwright's own.

  Raises RuntimeError, one line that says what is missing.
  """
  try:
    from playwright.sync_api import sync_playwright
  except ImportError:
    raise RuntimeError(
      "playwright is missing: pip install 'deepseek_jax[pages]'"
    ) from None
  found = next(filter(None, map(shutil.which, NAMES)), None)
  if found is not None:
    return found
  with sync_playwright() as playwright:
    if os.path.exists(playwright.chromium.executable_path):
      return None
  raise RuntimeError(
    f'no browser: none of {", ".join(NAMES)} is installed (Debian: apt-get'
    ' install chromium; else: playwright install chromium)'
  )


def launched(case):
  """Returns a browser for a class of tests, which closes it in the end."""
  from playwright.sync_api import sync_playwright

  path = browser()
  playwright = case.enterClassContext(sync_playwright())
  found = playwright.chromium.launch(
    executable_path=path, args=['--no-sandbox']
  )
  case.addClassCleanup(found.close)
  return found


def main():
  try:
    browser()
  except RuntimeError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  import pytest

  here = os.path.dirname(__file__)
  where = [os.path.join(here, name) for name in TESTS]
  sys.exit(pytest.main([*where, '-m', 'slow', '-s', *sys.argv[1:]]))


if __name__ == '__main__':
  main()
