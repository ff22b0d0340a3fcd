"""Fixtures and settings of the whole suite: offline, one thread, no progress bars."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import datasets  # noqa: F401  before any test captures stderr: its log handler keeps the stream that it finds
import pytest
import torch
import transformers
from tiny import CLASSES

import hf_prune  # noqa: F401  the loader is installed in every test process


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(params=sorted(CLASSES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for names in CLASSES.values() for name in names])
def class_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["uniform", "per_layer"])
def cut_shapes(request: pytest.FixtureRequest) -> str:
    return request.param
