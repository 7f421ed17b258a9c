"""What a test needs and a machine may lack. Without it the test is skipped; where TRACEGRAD_CI is set, it fails."""

import os
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skip the test that asks, aloud; in CI nothing is skipped that CI is there for."""
    if "TRACEGRAD_CI" in os.environ:
        pytest.fail(f"CI promises to run this test: {what}", pytrace=False)
    pytest.skip(what)
