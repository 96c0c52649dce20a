"""A cost model of a device that runs a model: how long one step takes.

The roofline (Williams, Waterman, Patterson 2009): a step reads all weights and the batch's keys and values, and
computes for each token; the slower of the two decides. Beyond one device, each layer ends in two all-reduces (tensor
parallelism as of Megatron-LM, Shoeybi et al. 2019). Left out: kernels that fill a device badly, pages, hiccups.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a decoder."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    params: float
    """That every token is multiplied with: all but the input embedding."""
    vocab_size: int
    max_model_len: int

    @property
    def weight_bytes(self) -> float:
        """In 16 bit."""
        return 2 * self.params

    @property
    def kv_bytes(self) -> int:
        """Of one token: keys and values of all layers in 16 bit."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2


@dataclass(frozen=True, slots=True)
class Device:
    """What computes. The peaks are those of the data sheet, of one device; `count` of them share the work evenly."""

    name: str
    model: Model
    bandwidth: float
    """Bytes per second of memory."""
    flops: float
    """Operations per second, dense, in 16 bit."""
    kv_memory: float
    """Bytes for keys and values, all devices together."""
    overhead: float
    """Seconds of a step that are neither: launches, sampling, the host."""
    bandwidth_share: float = 0.8
    """Of the peak that is reached. An assumption; good kernels reach 0.75 to 0.9."""
    flops_share: float = 0.6
    """Of the peak that is reached. An assumption; large 16-bit products on Hopper reach 0.6 to 0.75."""
    count: int = 1
    link_bandwidth: float = 0.0
    """Bytes per second and direction between devices."""
    link_latency: float = 0.0
    """Seconds of one all-reduce of nothing."""
    slowness: float = 1.0
    """Factor on every step: 4 is a quarter of the device."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return int(self.kv_memory / self.model.kv_bytes)

    def step_seconds(self, tokens: int, entries: float, pairs: float) -> float:
        """Of a step with `tokens` new tokens that reads `entries` cached ones and scores `pairs` (query, key)."""
        model = self.model
        moved = model.weight_bytes + entries * model.kv_bytes
        computed = 2 * tokens * model.params + 4 * pairs * model.num_layers * model.num_heads * model.head_dim
        reading = moved / (self.bandwidth * self.bandwidth_share)
        computing = computed / (self.flops * self.flops_share)
        return self.slowness * (max(reading, computing) / self.count + self._all_reduces(tokens) + self.overhead)

    def request_seconds(self, prompt: int, output: int) -> float:
        """Of a request alone on the device: its prompt in one step, then its tokens one by one."""
        prefill = self.step_seconds(prompt, prompt, prompt * (prompt + 1) / 2)
        middle = prompt + output / 2
        return prefill + (output - 1) * self.step_seconds(1, middle, middle)

    def _all_reduces(self, tokens: int) -> float:
        """Two per layer, in a ring: each device sends its part of the hidden states twice."""
        if self.count == 1:
            return 0.0
        sent = 2 * (self.count - 1) / self.count * tokens * self.model.hidden * 2
        return 2 * self.model.num_layers * (self.link_latency + sent / self.link_bandwidth)


LLAMA_8B = Model("Llama-3.1-8B", 32, 4096, 32, 8, 128, params=7.5e9, vocab_size=128_256, max_model_len=32_768)
"""Its config.json: 8.03e9 parameters, of which 0.53e9 are the input embedding. (It can 131,072 tokens.)"""
QUIRE_MINI = Model("quire-mini", 5, 448, 4, 2, 128, params=14e6, vocab_size=8192, max_model_len=4096)
"""models/quire-mini/config.json."""
QWEN_HALF_B = Model("Qwen2.5-0.5B", 24, 896, 14, 2, 64, params=0.494e9, vocab_size=151_936, max_model_len=32_768)
"""Its config.json; the output layer is the input embedding, so all parameters count."""

# NVIDIA H200 data sheet: 141 GB at 4.8 TB/s, 989 TFLOPS dense bfloat16, NVLink 450 GB/s each way. Nine tenths of the
# memory are used. An all-reduce of nothing takes about 10 us within a node (NCCL).
_H200 = Device(
    "Llama-3.1-8B on one H200",
    LLAMA_8B,
    bandwidth=4.8e12,
    flops=989e12,
    kv_memory=0.9 * 141e9 - LLAMA_8B.weight_bytes,
    overhead=0.5e-3,
)
# Two cores of a server CPU: about 10 GB/s and, with AVX-512 at 3 GHz (2 units x 16 lanes x 2), 190 GFLOPS each.
_CPU = Device(
    "Qwen2.5-0.5B on two CPU cores",
    QWEN_HALF_B,
    bandwidth=20e9,
    flops=380e9,
    kv_memory=4e9,
    overhead=0.5e-3,
    flops_share=0.4,
)

DEVICES = {
    "h200": _H200,
    "8xh200": replace(
        _H200,
        name="Llama-3.1-8B on eight H200",
        kv_memory=8 * 0.9 * 141e9 - LLAMA_8B.weight_bytes,
        count=8,
        link_bandwidth=450e9,
        link_latency=10e-6,
    ),
    "cpu-0.5b": _CPU,
    "cpu-mini": replace(_CPU, name="quire-mini on two CPU cores", model=QUIRE_MINI, kv_memory=0.5e9),
}
