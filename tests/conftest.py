"""Shared by all tests: the repository on sys.path, and the parity summary."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_parity_lines = []


@pytest.fixture
def parity_report():
    return _parity_lines.append


def pytest_terminal_summary(terminalreporter):
    if _parity_lines:
        terminalreporter.section('largest differences from transformers')
        for line in _parity_lines:
            terminalreporter.write_line(line)
