"""Without a GPU all tests run with Triton's interpreter on.

Triton decides when a function is defined whether it is compiled or interpreted, its own library's functions included:
so the variable must stand before anything imports triton, which torch may do at any time.

Hypothesis draws the same examples in every run and times none, so that a loaded machine fails no test.
"""

import os

import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
