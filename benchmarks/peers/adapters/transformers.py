"""transformers' continuous batching, the scheduler behind its `transformers serve`."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


class Engine:
    """Paged attention by torch's own, the fastest it has on a CPU."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=dtype, attn_implementation="paged|sdpa"
        ).eval()
        self._blocks = settings["streams"] * 2 + settings["length"] // 256 + 1
        self.facts = {"version": transformers.__version__, "types": f"{settings['dtype']}, torch {torch.__version__}"}

    def generate(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        """Greedy, past any end token."""
        config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(num_blocks=self._blocks, max_batch_tokens=2048)
        done = self._model.generate_batch(prompts, config, batching)
        return [one.generated_tokens for one in done.values()]
