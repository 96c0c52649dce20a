"""The command line `quire`: serve, chat, complete, eval-pruning. Each option has an environment name `QUIRE_...`.

Whatever goes wrong is one line on standard error and a non-zero exit code.
"""

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.config import EngineConfig, embedded_model, parse_size
from ..core.errors import ConfigError, QuireError
from ..core.pruning import PruneParams

app = typer.Typer(
    help="Quire: serve large language models with a paged KV cache that can be pruned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODEL = "Model"
_MEMORY = "Memory and batching"
_PRUNING = "Pruning"
_ORDER = "Order and deadlines"
ModelArgument = Annotated[
    str | None,
    typer.Argument(envvar="QUIRE_MODEL", help="Checkpoint folder or hub name; the embedded quire-mini if absent."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(
        envvar="QUIRE_DEVICE", help="Where to compute; auto takes a GPU if there is one.", rich_help_panel=_MODEL
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        envvar="QUIRE_DTYPE",
        help="Type of weights and KV; auto: the checkpoint's, if the device is good at it.",
        rich_help_panel=_MODEL,
    ),
]
Runner = Annotated[
    Literal["auto", "native", "transformers"],
    typer.Option(
        envvar="QUIRE_RUNNER",
        help="Whose model code runs; auto: ours where it knows the architecture.",
        rich_help_panel=_MODEL,
    ),
]
AttentionBackend = Annotated[
    Literal["auto", "reference", "cpu", "triton", "xformers"],
    typer.Option(
        envvar="QUIRE_ATTENTION_BACKEND",
        help="Whose kernels compute: reference is plain torch, cpu compiled C++, triton Quire's for NVIDIA GPUs (not "
        "yet run on one), xformers the same with xformers' attention where it can; auto: cpu, or reference on a GPU.",
        rich_help_panel=_MODEL,
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        envvar="QUIRE_CUDA_GRAPHS",
        help="With triton: replay decode steps as CUDA graphs, captured when first needed.",
        rich_help_panel=_MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        envvar="QUIRE_MAX_MODEL_LEN",
        help="Longest prompt + output in tokens; default: what the model was trained for.",
        rich_help_panel=_MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        envvar="QUIRE_TRUST_REMOTE_CODE",
        help="Run Python code that comes with the checkpoint.",
        rich_help_panel=_MODEL,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        envvar="QUIRE_SEED", help="Makes runs repeatable for requests that bring no seed.", rich_help_panel=_MODEL
    ),
]
MaxNumSeqs = Annotated[
    int, typer.Option(envvar="QUIRE_MAX_NUM_SEQS", help="Most sequences that run at once.", rich_help_panel=_MEMORY)
]
MaxBatchTokens = Annotated[
    int,
    typer.Option(
        envvar="QUIRE_MAX_BATCH_TOKENS",
        help="Most tokens of one step; longer prompts are computed in chunks.",
        rich_help_panel=_MEMORY,
    ),
]
MaxWaiting = Annotated[
    int,
    typer.Option(
        envvar="QUIRE_MAX_WAITING",
        help="Most sequences that wait; more are refused with a 429.",
        rich_help_panel=_MEMORY,
    ),
]
KvMemory = Annotated[
    str | None,
    typer.Option(
        envvar="QUIRE_KV_MEMORY",
        help="Size of the KV pool, e.g. 4GiB; default: a share of what is free.",
        rich_help_panel=_MEMORY,
    ),
]
PageSize = Annotated[
    int, typer.Option(envvar="QUIRE_PAGE_SIZE", help="Tokens of one KV page.", rich_help_panel=_MEMORY)
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        envvar="QUIRE_PREFIX_CACHE",
        help="Keep computed prefixes while there is room, for requests that begin alike.",
        rich_help_panel=_MEMORY,
    ),
]
SwapMemory = Annotated[
    str,
    typer.Option(
        envvar="QUIRE_SWAP_MEMORY",
        help="Host memory, e.g. 8GiB, for preempted sequences and for prefixes that leave the KV pool; 0: none.",
        rich_help_panel=_MEMORY,
    ),
]
MaxCacheTtl = Annotated[
    float,
    typer.Option(
        envvar="QUIRE_MAX_CACHE_TTL",
        help="Longest time in seconds that cache_ttl of a request keeps its prompt cached; 0: not at all.",
        rich_help_panel=_MEMORY,
    ),
]
CacheFile = Annotated[
    str | None,
    typer.Option(
        envvar="QUIRE_CACHE_FILE",
        help="File that keeps computed prefixes over a restart: written at the end, read at the start.",
        rich_help_panel=_MEMORY,
    ),
]
PrunePolicy = Annotated[
    str | None,
    typer.Option(
        envvar="QUIRE_PRUNE_POLICY",
        help="Prune the KV cache of requests that do not say how, by this policy; /v1/models lists them.",
        rich_help_panel=_PRUNING,
    ),
]
PruneKeep = Annotated[
    float,
    typer.Option(
        envvar="QUIRE_PRUNE_KEEP", help="Share of the entries that the policy keeps.", rich_help_panel=_PRUNING
    ),
]
PruneMinKeep = Annotated[
    float,
    typer.Option(
        envvar="QUIRE_PRUNE_MIN_KEEP", help="Least share that a request may ask to keep.", rich_help_panel=_PRUNING
    ),
]
Pressure = Annotated[
    Literal["preempt", "prune"],
    typer.Option(
        envvar="QUIRE_PRESSURE",
        help="When KV pages run out: preempt and recompute, or first prune who allows it; "
        "the policy of --prune-policy then prunes under pressure only.",
        rich_help_panel=_PRUNING,
    ),
]
Policy = Annotated[
    Literal["fcfs", "priority", "fair", "sjf"],
    typer.Option(
        envvar="QUIRE_POLICY",
        help="Who comes first: fcfs by arrival; priority by the request's priority; fair the API key (or user) that "
        "got least so far; sjf the shortest expected output. Waiting always counts too.",
        rich_help_panel=_ORDER,
    ),
]
MaxItlMs = Annotated[
    float | None,
    typer.Option(
        envvar="QUIRE_MAX_ITL_MS",
        help="Target time between tokens in milliseconds: prompts are computed in chunks small enough for it.",
        rich_help_panel=_ORDER,
    ),
]
MaxWaitingTokens = Annotated[
    int | None,
    typer.Option(
        envvar="QUIRE_MAX_WAITING_TOKENS",
        help="Most prompt tokens that wait; more are refused with a 429.",
        rich_help_panel=_ORDER,
    ),
]
QueueTimeout = Annotated[
    float | None,
    typer.Option(
        envvar="QUIRE_QUEUE_TIMEOUT",
        help="Seconds after which a request that was not started fails with a 504.",
        rich_help_panel=_ORDER,
    ),
]
_DEFAULTS = EngineConfig(model="")


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        print(f"quire {version('quire')}")
        raise typer.Exit()


@app.command()
def serve(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(envvar="QUIRE_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="QUIRE_PORT", help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QUIRE_SERVED_MODEL_NAME", help="Name(s) of the model in the API; default: its folder or hub name."
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QUIRE_API_KEY",
            help="Ask a key of every route but /health and /ready; KEY or NAME=KEY, several are separate tenants.",
        ),
    ] = None,
    isolate_keys: Annotated[
        bool,
        typer.Option(
            "--isolate-keys",
            envvar="QUIRE_ISOLATE_KEYS",
            help="Never reuse a computed prefix of another key's tenant.",
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runner: Runner = "auto",
    attention_backend: AttentionBackend = "auto",
    cuda_graphs: CudaGraphs = _DEFAULTS.cuda_graphs,
    max_model_len: MaxModelLen = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = None,
    max_num_seqs: MaxNumSeqs = _DEFAULTS.max_num_seqs,
    max_batch_tokens: MaxBatchTokens = _DEFAULTS.max_batch_tokens,
    max_waiting: MaxWaiting = _DEFAULTS.max_waiting,
    kv_memory: KvMemory = None,
    page_size: PageSize = _DEFAULTS.page_size,
    prefix_cache: PrefixCache = _DEFAULTS.prefix_cache,
    swap_memory: SwapMemory = "0",
    max_cache_ttl: MaxCacheTtl = _DEFAULTS.max_cache_ttl,
    cache_file: CacheFile = None,
    prune_policy: PrunePolicy = None,
    prune_keep: PruneKeep = 0.5,
    prune_min_keep: PruneMinKeep = 0.0,
    pressure: Pressure = _DEFAULTS.pressure,
    policy: Policy = _DEFAULTS.policy,
    max_itl_ms: MaxItlMs = None,
    max_waiting_tokens: MaxWaitingTokens = None,
    queue_timeout: QueueTimeout = None,
) -> None:
    """Serve MODEL over an OpenAI-style HTTP API."""
    from .keys import parse_keys
    from .serving import ServeOptions, served_name
    from .serving import serve as run
    from .settings import ServerSettings

    model = model or str(embedded_model())
    when: Literal["always", "pressure"] = "pressure" if pressure == "prune" else "always"
    prune = PruneParams(policy=prune_policy, keep=prune_keep, when=when) if prune_policy else None
    config = EngineConfig(
        model=model,
        device=device,
        dtype=dtype,
        runner=runner,
        attention_backend=attention_backend,
        cuda_graphs=cuda_graphs,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_waiting=max_waiting,
        kv_memory=parse_size(kv_memory) if kv_memory else None,
        page_size=page_size,
        prefix_cache=prefix_cache,
        swap_memory=parse_size(swap_memory),
        max_cache_ttl=max_cache_ttl,
        cache_file=cache_file,
        prune=prune,
        pressure=pressure,
        trust_remote_code=trust_remote_code,
        policy=policy,
        max_itl_ms=max_itl_ms,
        max_waiting_tokens=max_waiting_tokens,
        queue_timeout=queue_timeout,
    )
    names = tuple(served_model_name or [served_name(model)])
    if isolate_keys and not api_key:
        raise ConfigError("--isolate-keys needs at least one --api-key", param="isolate_keys")
    settings = ServerSettings(
        served_model_names=names,
        api_keys=parse_keys(api_key or ()),
        isolate_keys=isolate_keys,
        seed=seed,
        prune=prune,
        prune_min_keep=prune_min_keep,
    )
    run(ServeOptions(engine=config, http=settings, host=host, port=port))


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option(envvar="QUIRE_MODEL", help="Checkpoint folder or hub name; quire-mini if absent.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runner: Runner = "auto",
    attention_backend: AttentionBackend = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = None,
) -> None:
    """Continue PROMPT offline, without a server."""
    from ..core.request import SamplingParams
    from .llm import LLM

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm = LLM(
        model,
        device=device,
        dtype=dtype,
        runner=runner,
        attention_backend=attention_backend,
        trust_remote_code=trust_remote_code,
        max_num_seqs=1,
    )
    print(llm.generate([text], params, progress=False)[0].choices[0].text)


@app.command()
def chat(
    url: Annotated[str, typer.Option(envvar="QUIRE_URL", help="Where the server answers.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name; default: the first one served.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="QUIRE_API_KEY", help="The server's key, if it asks for one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
) -> None:
    """Chat with a running server in the terminal."""
    from .chat import Conversation, run_chat

    run_chat(Conversation(url, model, api_key, system, temperature, max_tokens))


_SWEEP = "Sweep"
_PRUNING = "Pruning"


@app.command()
def eval_pruning(
    model: ModelArgument = None,
    policies: Annotated[
        str, typer.Option(help="Policies, comma-separated; all that suit the model if absent.", rich_help_panel=_SWEEP)
    ] = "",
    keeps: Annotated[
        str, typer.Option(help="Shares of the entries that stay, comma-separated.", rich_help_panel=_SWEEP)
    ] = "1,0.75,0.5,0.35,0.25,0.125",
    tasks: Annotated[str, typer.Option(help="Tasks, comma-separated; all if absent.", rich_help_panel=_SWEEP)] = "",
    lengths: Annotated[
        str,
        typer.Option(help="Prompt tokens, comma-separated; what fits the model if absent.", rich_help_panel=_SWEEP),
    ] = "",
    samples: Annotated[int, typer.Option(help="Trials per task, length and setting.", rich_help_panel=_SWEEP)] = 25,
    chunk: Annotated[
        int, typer.Option(help="Tokens computed, and pruned after, at a time.", rich_help_panel=_SWEEP)
    ] = 256,
    text_format: Annotated[
        Literal["code", "prose"] | None,
        typer.Option("--format", help="Text of the trials; code for quire-mini, else prose.", rich_help_panel=_SWEEP),
    ] = None,
    seed: Annotated[int, typer.Option(help="Other trials for another seed.", rich_help_panel=_SWEEP)] = 0,
    budget: Annotated[
        str, typer.Option(help="Division of the entries among layers and heads.", rich_help_panel=_PRUNING)
    ] = "uniform",
    threshold: Annotated[
        float | None, typer.Option(help="With the budget threshold: drops what scores less.", rich_help_panel=_PRUNING)
    ] = None,
    refine: Annotated[
        str, typer.Option(help="Refinements of the scores, comma-separated.", rich_help_panel=_PRUNING)
    ] = "",
    chunked: Annotated[
        bool,
        typer.Option(help="Prune after each chunk of the prompt, or at its end alone.", rich_help_panel=_PRUNING),
    ] = True,
    floor: Annotated[int, typer.Option(help="Fewest entries per head that stay.", rich_help_panel=_PRUNING)] = 1,
    window: Annotated[int, typer.Option(help="Newest entries that always stay.", rich_help_panel=_PRUNING)] = 64,
    out: Annotated[Path, typer.Option(help="Folder for results.json and the plots.")] = Path("pruning-quality"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    runner: Runner = "auto",
    attention_backend: AttentionBackend = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what pruning costs in quality and gives in memory and time: recall, copying, loss, agreement."""
    from .evaluate import EvalOptions, evaluate, items

    prune = {"budget": budget, "threshold": threshold, "floor": floor, "window": window, "chunked": chunked}
    engine = {"device": device, "dtype": dtype, "runner": runner, "attention_backend": attention_backend}
    evaluate(
        EvalOptions(
            model=model,
            policies=items(policies, str, "--policies"),
            keeps=items(keeps, float, "--keeps"),
            prune=prune | {"refine": tuple(items(refine, str, "--refine"))},
            tasks=items(tasks, str, "--tasks"),
            lengths=items(lengths, int, "--lengths"),
            samples=samples,
            chunk=chunk,
            seed=seed,
            text_format=text_format,
            out=out,
            engine=engine | {"trust_remote_code": trust_remote_code},
        )
    )


def main() -> None:
    """Entry point of the command `quire`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app()
    except QuireError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)
