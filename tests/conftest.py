"""Without a GPU all tests run with Triton's interpreter on.

Triton decides when a function is defined whether it is compiled or interpreted, its own library's functions included:
so the variable must stand before anything imports triton, which torch may do at any time.

Hypothesis draws the same examples in every run and times none, and every test begins with the same seeds: alone, in any
order and on a loaded machine it sees the same numbers.
"""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the test's fixtures, those of its module included."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
