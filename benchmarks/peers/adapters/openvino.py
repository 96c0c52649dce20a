"""OpenVINO GenAI: its continuous batching pipeline on a model that optimum-intel exported without quantizing it."""

import subprocess
import sys
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai


def convert(model: str, folder: str) -> None:
    """Export with the weights' own type."""
    command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", model]
    command += ["--task", "text-generation-with-past", "--weight-format", "fp16", folder]
    subprocess.run([sys.executable, *command], check=True)


class Engine:
    """Computing and keeping keys and values in the type asked for; its default keeps them in 8 bits."""

    def __init__(self, settings: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = settings["streams"]
        scheduler.cache_size = settings["kv_bytes"] >> 30
        kind = {"bfloat16": "bf16", "float32": "f32"}[settings["dtype"]]
        hints = {
            "INFERENCE_PRECISION_HINT": kind,
            "KV_CACHE_PRECISION": kind,
            "INFERENCE_NUM_THREADS": settings["threads"],
        }
        self._pipeline = genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", hints)
        self.facts = {
            "version": genai.__version__.split("-")[0],
            "types": f"fp16 weights, computed in {kind}, KV cache {kind}",
        }

    def generate(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        """Greedy, past any end token."""
        config = genai.GenerationConfig(max_new_tokens=output, min_new_tokens=output, ignore_eos=True, do_sample=False)
        given = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return [one.m_generation_ids[0] for one in self._pipeline.generate(given, [config] * len(given))]
