"""From the operator's setting `draft` to a `Drafter`."""

import logging
from pathlib import Path

from ..core.config import EngineConfig
from ..core.errors import ConfigError, ModelLoadError
from ..core.speculation import DraftChoice, parse_draft
from ..kernels.cpu_library import loaded_library
from ..models.checkpoint import open_checkpoint, read_json
from ..models.loading import load_runner
from ..models.native import NativeRunner
from ..models.placement import Placement
from ..models.runner import ModelRunner, ProgressCallback
from .draft_cache import DraftLayout
from .drafter import Drafter
from .hybrid import SHORTEST_MATCH, HybridDrafter
from .layerskip import LayerskipDrafter
from .model import ModelDrafter
from .ngram import SHORTEST, NgramDrafter
from .target import TargetCache

log = logging.getLogger("quire")

DRAFT_FOLDER = "draft"
"""Of a checkpoint: the draft model that it brings along."""


def chosen_draft(config: EngineConfig) -> DraftChoice:
    """What `config.draft` comes to: auto is n-grams, with the draft model in the folder `draft` of the target's
    checkpoint if it brings one along."""
    choice = parse_draft(config.draft)
    if choice.method != "auto":
        return choice
    folder = open_checkpoint(config.model).folder / DRAFT_FOLDER
    return parse_draft(f"ngram+{folder}" if (folder / "config.json").is_file() else "ngram")


def load_draft(
    config: EngineConfig, target: ModelRunner, place: Placement, on_progress: ProgressCallback
) -> ModelRunner | None:
    """The draft model for a target, also for `ModelDrafter.replace`; None where `config.draft` names no model.

    Raises `ConfigError` where the model that it names cannot be loaded or its token ids are not the target's. What the
    checkpoint brought along nobody asked for: one line says why it is not used.
    """
    choice = chosen_draft(config)
    if not choice.model:
        return None
    try:
        return _loaded(choice.model, config, target, place, on_progress)
    except ConfigError as error:
        if config.draft != "auto":
            raise
        log.warning("n-grams draft alone: %s", error.message)
        return None


def _loaded(
    name: str, config: EngineConfig, target: ModelRunner, place: Placement, on_progress: ProgressCallback
) -> ModelRunner:
    try:
        draft = load_runner(
            name,
            place=place,
            runner="auto",
            trust_remote_code=config.trust_remote_code,
            on_progress=on_progress,
            target=target,
        )
        _check_vocabulary(name, draft, config.model, target)
    except ModelLoadError as error:
        raise ConfigError(f"the draft cannot be used: {error.message}", param="draft") from error
    return draft


def make_drafter(
    config: EngineConfig,
    target: ModelRunner,
    draft: ModelRunner | None,
    cache: TargetCache,
    place: Placement,
    *,
    max_model_len: int,
    num_slots: int,
) -> Drafter | None:
    """The drafter that `config.draft` names, for a target and its cache; None for `none`. `draft` is from `load_draft`.

    Raises `ConfigError` in one line where it does not go with the target.
    """
    choice = chosen_draft(config)
    if choice.method == "none":
        return None
    if choice.method == "layerskip":
        return LayerskipDrafter(_skippable(target, choice.layers), choice.layers, cache, place)
    stream = max(max_model_len, config.max_stream_len or 0)
    if draft is None:
        return ngrams(num_slots, stream, place)
    # As many tokens as the target's own pages hold: what the draft lacks beyond that, pruning has freed above.
    heads = target.spec.num_layers * target.spec.num_kv_heads
    num_pages, page_size = cache.entry_positions.shape
    layout = DraftLayout(num_slots, max_model_len, page_size, num_pages // heads * page_size)
    try:
        model = ModelDrafter(draft, layout, place, target)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise ConfigError(
            f"the draft's cache could not be allocated: {str(error).splitlines()[0]}", param="draft"
        ) from error
    if choice.method == "model":
        return model
    return HybridDrafter(ngrams(num_slots, stream, place, SHORTEST_MATCH), model)


def ngrams(num_slots: int, max_length: int, place: Placement, shortest: int = SHORTEST) -> NgramDrafter:
    """Matches `shortest` tokens or more, by the compiled kernels where these compute the model."""
    return NgramDrafter(num_slots, max_length, shortest, loaded_library() if place.backend == "cpu" else None)


def cache_share(draft: ModelRunner, target: ModelRunner) -> float:
    """Bytes of the draft's cache per byte of the target's, where both hold the same tokens of the same type."""
    sizes = [m.spec.num_layers * m.spec.num_kv_heads * m.spec.head_dim for m in (draft, target)]
    return sizes[0] / sizes[1]


def _skippable(runner: ModelRunner, layers: int) -> NativeRunner:
    if not isinstance(runner, NativeRunner):
        raise ConfigError("layerskip drafts with models on the native runner only", param="draft")
    if layers >= runner.spec.num_layers:
        raise ConfigError(
            f"layerskip:{layers} needs a model of more than {layers} layers, {runner.spec.name} has "
            f"{runner.spec.num_layers}",
            param="draft",
        )
    return runner


def _check_vocabulary(draft_name: str, draft: ModelRunner, target_name: str, target: ModelRunner) -> None:
    """Raise `ConfigError` where token ids do not mean the same; a different padding of the vocabulary is fine."""
    same = _same_tokenizer(open_checkpoint(draft_name).folder, open_checkpoint(target_name).folder)
    widths = draft.spec.vocab_size, target.spec.vocab_size
    if widths[0] != widths[1] and not same:
        why = "their tokenizers differ" if same is False else "there are no tokenizers to compare"
        raise ConfigError(
            f"the draft {draft_name} has {widths[0]} tokens, {target_name} has {widths[1]}, and {why}", param="draft"
        )
    if same is False:
        log.warning("the draft %s has another tokenizer than %s: few drafts will be right", draft_name, target_name)


def _same_tokenizer(first: Path, second: Path) -> bool | None:
    """Whether two checkpoints give tokens the same ids; None: they bring no files that tell."""
    pair = [folder / "tokenizer.json" for folder in (first, second)]
    if all(path.is_file() for path in pair):
        return _token_ids(pair[0]) == _token_ids(pair[1])
    for name in ("tokenizer.model", "vocab.json"):
        pair = [folder / name for folder in (first, second)]
        if all(path.is_file() for path in pair):
            return pair[0].read_bytes() == pair[1].read_bytes()
    return None


def _token_ids(tokenizer: Path) -> object:
    """What a tokenizer.json says of ids: vocabulary and added tokens."""
    content = read_json(tokenizer)
    model = content.get("model") or {}
    return model.get("vocab"), [(token.get("id"), token.get("content")) for token in content.get("added_tokens") or []]
