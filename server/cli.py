"""The command line `quire`: serve, chat, complete, eval-pruning, distill.

What configures a server has an environment name `QUIRE_...` too. Whatever goes wrong is one line on standard error
and a non-zero exit code.
"""

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.config import LOG_FORMAT, EngineConfig
from ..core.errors import QuireError
from . import distill_options as dis
from . import options as opt
from . import sweep_options as sweep

app = typer.Typer(
    help="Quire: serve large language models with a paged KV cache that can be pruned, and speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULTS = EngineConfig(model="")
_UsageError: Any = typer.BadParameter.__base__
"""What a command line that cannot be read raises; typer has no public name for it in all of its releases."""


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        print(f"quire {version('quire')}")
        raise typer.Exit()


@app.command()
def serve(
    model: opt.ModelArgument = None,
    host: opt.Host = "127.0.0.1",
    port: opt.Port = 8000,
    served_model_name: opt.ServedModelName = None,
    api_key: opt.ApiKeys = None,
    admin_key: opt.AdminKeys = None,
    isolate_keys: opt.IsolateKeys = False,
    cors_origin: opt.CorsOrigins = None,
    distill_log: opt.DistillLog = None,
    distill_log_share: opt.DistillLogShare = 1.0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    runner: opt.Runner = "auto",
    attention_backend: opt.AttentionBackend = "auto",
    cuda_graphs: opt.CudaGraphs = _DEFAULTS.cuda_graphs,
    max_model_len: opt.MaxModelLen = None,
    max_stream_len: opt.MaxStreamLen = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    seed: opt.Seed = None,
    max_num_seqs: opt.MaxNumSeqs = _DEFAULTS.max_num_seqs,
    max_batch_tokens: opt.MaxBatchTokens = _DEFAULTS.max_batch_tokens,
    max_waiting: opt.MaxWaiting = _DEFAULTS.max_waiting,
    kv_memory: opt.KvMemory = None,
    page_size: opt.PageSize = _DEFAULTS.page_size,
    prefix_cache: opt.PrefixCache = _DEFAULTS.prefix_cache,
    swap_memory: opt.SwapMemory = "0",
    max_cache_ttl: opt.MaxCacheTtl = _DEFAULTS.max_cache_ttl,
    cache_file: opt.CacheFile = None,
    prune_policy: opt.PrunePolicy = None,
    prune_keep: opt.PruneKeep = 0.5,
    prune_min_keep: opt.PruneMinKeep = 0.0,
    pressure: opt.Pressure = _DEFAULTS.pressure,
    draft: opt.Draft = _DEFAULTS.draft,
    draft_tokens: opt.DraftTokens = "auto",
    policy: opt.Policy = _DEFAULTS.policy,
    max_itl_ms: opt.MaxItlMs = None,
    max_waiting_tokens: opt.MaxWaitingTokens = None,
    queue_timeout: opt.QueueTimeout = None,
) -> None:
    """Serve MODEL over an OpenAI-style HTTP API."""
    options = locals()
    from .configure import serve_options
    from .serving import serve as run

    run(serve_options(options))


@app.command()
def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option(envvar="QUIRE_MODEL", help="Checkpoint folder or hub name; quire-mini if absent.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    runner: opt.Runner = "auto",
    attention_backend: opt.AttentionBackend = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    draft: opt.Draft = _DEFAULTS.draft,
    draft_tokens: opt.DraftTokens = "auto",
    seed: opt.Seed = None,
) -> None:
    """Continue PROMPT offline, without a server."""
    from ..core.request import SamplingParams
    from .drafting import draft_settings
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
        **draft_settings(draft, draft_tokens),
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


@app.command()
def eval_pruning(
    model: opt.ModelArgument = None,
    policies: sweep.Policies = "",
    keeps: sweep.Keeps = "1,0.75,0.5,0.35,0.25,0.125",
    tasks: sweep.Tasks = "",
    lengths: sweep.Lengths = "",
    samples: sweep.Samples = 25,
    chunk: sweep.Chunk = 256,
    question: sweep.Question = "seen",
    text_format: sweep.TextFormat = None,
    seed: sweep.TrialSeed = 0,
    budget: sweep.Budget = "uniform",
    threshold: sweep.Threshold = None,
    refine: sweep.Refine = "",
    chunked: sweep.Chunked = True,
    floor: sweep.Floor = 1,
    window: sweep.Window = 64,
    out: sweep.Out = Path("pruning-quality"),
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    runner: opt.Runner = "auto",
    attention_backend: opt.AttentionBackend = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Measure what pruning costs in quality and gives in memory and time: recall, copying, loss, agreement."""
    options = locals()
    from .evaluate import eval_options, evaluate

    evaluate(eval_options(options))


@app.command()
def distill(
    out: dis.Out,
    target: dis.Target = None,
    preset: dis.Preset = None,
    init: dis.Init = None,
    mlp: dis.Mlp = None,
    kv_heads: dis.KvHeads = None,
    hidden: dis.Hidden = None,
    share_embedding: dis.ShareEmbedding = None,
    data: dis.Data = None,
    from_traffic: dis.FromTraffic = None,
    self_data: dis.SelfData = False,
    held_out: dis.HeldOut = None,
    mix: dis.Mix = "0.4,0.4,0.2",
    temperatures: dis.Temperatures = "1,0",
    length: dis.Length = 512,
    divergence: dis.Divergence = "kl",
    temperature: dis.Temperature = 1.0,
    kept: dis.Kept = 64,
    steps: dis.Steps = 2000,
    batch_rows: dis.BatchRows = 8,
    micro_rows: dis.MicroRows = 4,
    round_rows: dis.RoundRows = 256,
    passes: dis.Passes = 2.0,
    rate: dis.Rate = 0.3,
    draft_tokens: dis.DraftTokens = 4,
    seed: dis.RunSeed = 0,
    device: opt.Device = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Distil a draft model for speculative decoding from the model that it is to draft for."""
    options = locals()
    from .distil import distil

    distil(options)


def main() -> None:
    """Entry point of the command `quire`."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        sys.exit(app(standalone_mode=False))
    except QuireError as error:
        sys.exit(f"error: {error.message}")
    except _UsageError as error:
        if line := " ".join(error.format_message().split()):  # empty where the help was shown instead
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
