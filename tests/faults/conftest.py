"""Ends a session with the table of all faults."""

from tests.faults import ledger


def pytest_terminal_summary(terminalreporter):
  lines = ledger.table()
  if lines:
    terminalreporter.section('faults')
    for line in lines:
      terminalreporter.write_line(line)
