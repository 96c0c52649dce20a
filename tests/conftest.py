"""Without a GPU all tests run with Triton's interpreter on.

Triton decides when a function is defined whether it is compiled or interpreted, its own library's functions included:
so the variable must stand before anything imports triton, which torch may do at any time.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
