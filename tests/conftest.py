"""Shared by all tests: the repository root on sys.path, and small corpora."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A demo corpus of about ten minutes of speech, made once per session. Do not write into it."""
    import demo

    return demo.make_demo(tmp_path_factory.mktemp("demo") / "corpus", scale=0.1, log=lambda _: None)


@pytest.fixture
def micro_tasks():
    """`tiny` and its heads smaller still, for a test of fine-tuning."""
    import small_tasks

    with small_tasks.micro_tiny():
        yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """Files of every task, a few rows each, for the tests of one module."""
    import small_tasks

    return small_tasks.write_all(tmp_path_factory.mktemp("tasks"))
