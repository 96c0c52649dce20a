"""llama.cpp through its C interface, in the way of its server and of `llama-batched-bench`: one decode for all streams.

The checkpoint becomes a GGUF file here, bf16 stays bf16. The project's own converter wants a tokenizer that it knows;
token ids go in and come out, so the file has none.
"""

import ctypes
import json
import struct
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as cpp
import numpy as np

BATCH = 2048
"""Tokens of one decode at most, the server's default."""
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def stored(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a checkpoint of bf16, as the bits they are."""
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
                first, last = entry["data_offsets"]
                bits = np.frombuffer(data[8 + size + first : 8 + size + last], np.uint16)
                yield name, bits.reshape(entry["shape"])


def renamed(name: str) -> str:
    """GGUF's name of a tensor."""
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not name.startswith("model.layers."):
        return outer.get(name, "output.weight")
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"blk.{number}.{NAMES[part]}.{kind}"


def interleaved(bits: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as Llama's first code had them: rotary pairs next to each other."""
    shape = bits.shape
    return bits.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def convert(model: str, folder: str) -> None:
    """Write FOLDER/model.gguf of a Llama or Qwen2 checkpoint."""
    config = json.loads((Path(model) / "config.json").read_text())
    kind, heads, kv_heads = (config[key] for key in ("model_type", "num_attention_heads", "num_key_value_heads"))
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    Path(folder).mkdir(parents=True)
    writer = gguf.GGUFWriter(Path(folder) / "model.gguf", kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    for name, bits in stored(Path(model)):
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            bits = interleaved(bits, heads if "q_proj" in name else kv_heads)
        if bits.ndim == 1:
            writer.add_tensor(renamed(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(renamed(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Engine:
    """One context per number of streams, as one would start the server with `--parallel`; defaults beyond that."""

    def __init__(self, settings: dict[str, Any]) -> None:
        cpp.llama_backend_init()
        self._settings = settings
        path = Path(settings["model"]) / "model.gguf"
        self._model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
        self._vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[tuple[int, int], Any] = {}
        self._batch = cpp.llama_batch_init(BATCH, 0, 1)
        self.facts = {"version": version("llama-cpp-python"), "types": "bf16 GGUF, KV cache f16"}

    def _context(self, streams: int, length: int) -> Any:
        key = streams, length
        if key not in self._contexts:
            params = cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = streams * length, streams
            params.n_batch = BATCH
            params.n_threads = params.n_threads_batch = self._settings["threads"]
            self._contexts[key] = cpp.llama_init_from_model(self._model, params)
        return self._contexts[key]

    def _decode(self, context: Any, tokens: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Add (token, position, stream, wanted?); the likeliest next token of those streams where it is wanted."""
        for index, (token, position, stream, wanted) in enumerate(tokens):
            self._batch.token[index] = token
            self._batch.pos[index] = position
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = stream
            self._batch.logits[index] = wanted
        self._batch.n_tokens = len(tokens)
        if (code := cpp.llama_decode(context, self._batch)) != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        found = {}
        for index, (_, _, stream, wanted) in enumerate(tokens):
            if wanted:
                address = ctypes.cast(cpp.llama_get_logits_ith(context, index), ctypes.c_void_p).value
                logits = (ctypes.c_float * self._vocab).from_address(address)
                found[stream] = int(np.frombuffer(logits, np.float32).argmax())
        return found

    def generate(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        """Greedy, past any end token."""
        length = max(len(prompt) for prompt in prompts) + output
        context = self._context(len(prompts), -(-length // 256) * 256)
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        prompt_tokens = [
            (token, position, stream, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        latest: dict[int, int] = {}
        for first in range(0, len(prompt_tokens), BATCH):
            latest |= self._decode(context, prompt_tokens[first : first + BATCH])
        done = [[latest[stream]] for stream in range(len(prompts))]
        for step in range(output - 1):
            tokens = [(done[stream][-1], len(prompts[stream]) + step, stream, True) for stream in range(len(prompts))]
            for stream, token in self._decode(context, tokens).items():
                done[stream].append(token)
        return done
