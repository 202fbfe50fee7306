"""Lets the test modules of this folder import its harness."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
