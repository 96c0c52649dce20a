"""vLLM's offline API, as its documentation for CPUs has it: compiled graphs, threads bound to cores, a set KV cache."""

import os
from typing import Any

import vllm


class Engine:
    """Its defaults beyond that; token ids go in and come out, no tokenizer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))[: settings["threads"]]
        # Left to itself it keeps a core of two for its other processes.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        self._llm = vllm.LLM(
            settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["length"],
            max_num_seqs=settings["streams"],
            kv_cache_memory_bytes=settings["kv_bytes"],
            skip_tokenizer_init=True,
        )
        self.facts = {"version": vllm.__version__, "types": settings["dtype"]}

    def generate(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        """Greedy, past any end token."""
        params = vllm.SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(one.outputs[0].token_ids) for one in self._llm.generate(given, params, use_tqdm=False)]
