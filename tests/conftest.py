"""Shared by all tests: the repository root on sys.path, and one small demo corpus per session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A demo corpus of about ten minutes of speech, made once per session. Do not write into it."""
    import demo

    return demo.make_demo(tmp_path_factory.mktemp("demo") / "corpus", scale=0.1, log=lambda _: None)
