"""Quire's offline API."""

from importlib.metadata import version
from typing import Any

import torch

from quire.core.request import SamplingParams
from quire.server.llm import LLM


class Engine:
    """All prompts at once, continuous batching; no drafts, as the others have none."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._llm = LLM(
            settings["model"],
            dtype=settings["dtype"],
            draft="none",
            max_num_seqs=settings["streams"],
            kv_memory=settings["kv_bytes"],
        )
        self.facts = {"version": version("quire"), "types": f"{settings['dtype']}, torch {torch.__version__}"}

    def generate(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        """Greedy, past any end token."""
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return [one.choices[0].token_ids for one in self._llm.generate(prompts, params, progress=False)]
