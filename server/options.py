"""The options of `quire serve` that set up model, engine and API; each has an environment name `QUIRE_...`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_MODEL = "Model"
_MEMORY = "Memory and batching"
_PRUNING = "Pruning"
_SPECULATION = "Speculation"
_ORDER = "Order and deadlines"


def _option(env: str, text: str, panel: str | None = None, *names: str) -> Any:
    return typer.Option(*names, envvar=env, help=text, rich_help_panel=panel)


ModelArgument = Annotated[
    str | None,
    typer.Argument(envvar="QUIRE_MODEL", help="Checkpoint folder or hub name; the embedded quire-mini if absent."),
]

Host = Annotated[str, _option("QUIRE_HOST", "Address to listen on.")]
Port = Annotated[int, _option("QUIRE_PORT", "Port to listen on; 0 takes a free one.")]
ServedModelName = Annotated[
    list[str] | None,
    _option("QUIRE_SERVED_MODEL_NAME", "Name(s) of the model in the API; default: its folder or hub name."),
]
ApiKeys = Annotated[
    list[str] | None,
    _option(
        "QUIRE_API_KEY",
        "Ask a key of every route but /health and /ready; KEY or NAME=KEY, several are separate tenants.",
    ),
]
AdminKeys = Annotated[
    list[str] | None,
    _option("QUIRE_ADMIN_KEY", "Key that alone opens /draft, and all other routes too; KEY or NAME=KEY."),
]
CorsOrigins = Annotated[
    list[str] | None,
    _option(
        "QUIRE_CORS_ORIGIN",
        "Origin, e.g. https://chat.example, whose web pages may call the API from a browser; * for all.",
        None,
        "--cors-origin",
    ),
]
IsolateKeys = Annotated[
    bool,
    _option("QUIRE_ISOLATE_KEYS", "Never reuse a computed prefix of another key's tenant.", None, "--isolate-keys"),
]

DistillLog = Annotated[
    Path | None,
    _option(
        "QUIRE_DISTILL_LOG",
        "Collect prompts, outputs and the model's most likely tokens at each of them in this file, for "
        "`quire distill --from-traffic`; it holds what users wrote.",
    ),
]
DistillLogShare = Annotated[
    float,
    _option(
        "QUIRE_DISTILL_LOG_SHARE",
        "Share of the requests, 0 to 1, whose most likely tokens are collected too; of the others only their tokens.",
    ),
]

Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    _option("QUIRE_DEVICE", "Where to compute; auto takes a GPU if there is one.", _MODEL),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _option("QUIRE_DTYPE", "Type of weights and KV; auto: the checkpoint's, if the device is good at it.", _MODEL),
]
Runner = Annotated[
    Literal["auto", "native", "transformers"],
    _option("QUIRE_RUNNER", "Whose model code runs; auto: ours where it knows the architecture.", _MODEL),
]
AttentionBackend = Annotated[
    Literal["auto", "reference", "cpu", "triton", "xformers"],
    _option(
        "QUIRE_ATTENTION_BACKEND",
        "Whose kernels compute: reference is plain torch, cpu compiled C++, triton Quire's for NVIDIA GPUs, xformers "
        "the same with xformers' attention where it can; auto: cpu, or on a GPU triton if its kernels, tried at start, "
        "give what plain torch gives, else reference (not yet run on a GPU by us).",
        _MODEL,
    ),
]
CudaGraphs = Annotated[
    bool,
    _option(
        "QUIRE_CUDA_GRAPHS",
        "With triton: replay decode steps as CUDA graphs, captured when first needed.",
        _MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    _option(
        "QUIRE_MAX_MODEL_LEN", "Longest prompt + output in tokens; default: what the model was trained for.", _MODEL
    ),
]
MaxStreamLen = Annotated[
    int | None,
    _option(
        "QUIRE_MAX_STREAM_LEN",
        "The same for requests whose positions close up as they forget (prune.positions), which may outgrow the "
        "model's context; default: no more than others.",
        _MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    _option(
        "QUIRE_TRUST_REMOTE_CODE", "Run Python code that comes with the checkpoint.", _MODEL, "--trust-remote-code"
    ),
]
Seed = Annotated[int | None, _option("QUIRE_SEED", "Makes runs repeatable for requests that bring no seed.", _MODEL)]

MaxNumSeqs = Annotated[int, _option("QUIRE_MAX_NUM_SEQS", "Most sequences that run at once.", _MEMORY)]
MaxBatchTokens = Annotated[
    int,
    _option("QUIRE_MAX_BATCH_TOKENS", "Most tokens of one step; longer prompts are computed in chunks.", _MEMORY),
]
MaxWaiting = Annotated[
    int, _option("QUIRE_MAX_WAITING", "Most sequences that wait; more are refused with a 429.", _MEMORY)
]
KvMemory = Annotated[
    str | None,
    _option("QUIRE_KV_MEMORY", "Size of the KV pool, e.g. 4GiB; default: a share of what is free.", _MEMORY),
]
PageSize = Annotated[int, _option("QUIRE_PAGE_SIZE", "Tokens of one KV page.", _MEMORY)]
PrefixCache = Annotated[
    bool,
    _option(
        "QUIRE_PREFIX_CACHE", "Keep computed prefixes while there is room, for requests that begin alike.", _MEMORY
    ),
]

SwapMemory = Annotated[
    str,
    _option(
        "QUIRE_SWAP_MEMORY",
        "Host memory, e.g. 8GiB, for preempted sequences and for prefixes that leave the KV pool; 0: none.",
        _MEMORY,
    ),
]
MaxCacheTtl = Annotated[
    float,
    _option(
        "QUIRE_MAX_CACHE_TTL",
        "Longest time in seconds that cache_ttl of a request keeps its prompt cached; 0: not at all.",
        _MEMORY,
    ),
]
CacheFile = Annotated[
    str | None,
    _option(
        "QUIRE_CACHE_FILE",
        "File that keeps computed prefixes over a restart: written at the end, read at the start.",
        _MEMORY,
    ),
]

PrunePolicy = Annotated[
    str | None,
    _option(
        "QUIRE_PRUNE_POLICY",
        "Prune the KV cache of requests that do not say how, by this policy; /v1/models lists them.",
        _PRUNING,
    ),
]
PruneKeep = Annotated[float, _option("QUIRE_PRUNE_KEEP", "Share of the entries that the policy keeps.", _PRUNING)]
PruneMinKeep = Annotated[
    float,
    _option(
        "QUIRE_PRUNE_MIN_KEEP",
        "Least share that a request must keep, whatever it asks for; with one, the budget threshold is refused.",
        _PRUNING,
    ),
]
Pressure = Annotated[
    Literal["preempt", "prune"],
    _option(
        "QUIRE_PRESSURE",
        "When KV pages run out: preempt and recompute, or first prune who allows it; the policy of --prune-policy then "
        "prunes under pressure only.",
        _PRUNING,
    ),
]

Draft = Annotated[
    str,
    _option(
        "QUIRE_DRAFT",
        "Who proposes tokens for the model to verify: a draft model (folder or hub name), ngram (what followed the "
        "same tokens before), ngram+MODEL (both), layerskip:N (the model's own first N layers), none; auto: ngram, "
        "with the draft model in the checkpoint's folder draft/ if there is one. Answers stay the model's own.",
        _SPECULATION,
    ),
]
DraftTokens = Annotated[
    str,
    _option(
        "QUIRE_DRAFT_TOKENS",
        "Tokens of every draft, 1 to 16; auto: as many as pay off at the time, none included.",
        _SPECULATION,
    ),
]

Policy = Annotated[
    Literal["fcfs", "priority", "fair", "sjf"],
    _option(
        "QUIRE_POLICY",
        "Who comes first: fcfs by arrival; priority by the request's priority; fair the API key (or user) that got "
        "least so far; sjf the shortest expected output. Waiting always counts too.",
        _ORDER,
    ),
]
MaxItlMs = Annotated[
    float | None,
    _option(
        "QUIRE_MAX_ITL_MS",
        "Target time between tokens in milliseconds: prompts are computed in chunks small enough for it.",
        _ORDER,
    ),
]
MaxWaitingTokens = Annotated[
    int | None,
    _option("QUIRE_MAX_WAITING_TOKENS", "Most prompt tokens that wait; more are refused with a 429.", _ORDER),
]
QueueTimeout = Annotated[
    float | None,
    _option("QUIRE_QUEUE_TIMEOUT", "Seconds after which a request that was not started fails with a 504.", _ORDER),
]
