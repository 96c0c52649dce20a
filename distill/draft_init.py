"""How a draft begins: as some layers of the target, with random weights, or where an earlier distillation ended.

A draft cut out of the target keeps its hidden size, unless told otherwise, so it can share the target's embedding and
output head, which are then neither trained nor stored: at small hidden sizes a head of its own saturates (papers on
distilled drafts see that below about 1,000), and for a small model it is most of the bytes. Where the target is wide,
its head is most of what a pass of the draft reads: a smaller hidden size makes that less too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..core.errors import ConfigError, ModelLoadError
from ..models.checkpoint import Checkpoint, TensorReader, open_checkpoint
from ..models.native import SHARES_EMBEDDING, native_obstacle
from .importance import decoder_layers, layer_importance
from .narrowing import Narrowing, Widths, narrow_config


@dataclass(frozen=True, slots=True)
class Init:
    """What a draft is to begin as."""

    source: str
    """`layers:N` (the N most important ones), `layers:I,J,...` (these), `random:N` (as many new ones), `preset:NAME`
    (see `presets`), or a folder."""
    mlp: int | None = None
    """Width of the feed-forward; None: the target's."""
    shares_embedding: bool | None = None
    """None: as the folder has it; where there is none, if the target is of an architecture whose drafts can."""
    kv_heads: int | None = None
    """Key/value heads, each with its query heads; None: the target's."""
    hidden: int | None = None
    """Channels of the hidden state; None: the target's. With a number the draft has an embedding of its own."""

    def settled(self, checkpoint: Checkpoint) -> "Init":
        """With sharing decided for the target's checkpoint; raises `ConfigError` for what cannot go together."""
        obstacle = native_obstacle(checkpoint)
        if not self.is_cut and (self.mlp, self.kv_heads, self.hidden) != (None, None, None):
            raise ConfigError("a draft that goes on from a folder keeps its widths", param="init")
        if self.hidden is not None:
            return self._narrowed(obstacle)
        if self.shares_embedding and obstacle is not None:
            raise ConfigError(f"the draft cannot share its target's embedding: {obstacle}", param="share_embedding")
        if self.shares_embedding is not None or not self.is_cut:
            return self
        return replace(self, shares_embedding=obstacle is None)

    def _narrowed(self, obstacle: str | None) -> "Init":
        """With a hidden size of its own."""
        if obstacle is not None:  # where norms and maps go by other names, or norms weigh otherwise
            raise ConfigError(f"the draft's hidden size must be its target's: {obstacle}", param="hidden")
        if self.shares_embedding:
            raise ConfigError("a draft of another hidden size cannot share its target's embedding", param="hidden")
        return replace(self, shares_embedding=False)

    @property
    def is_cut(self) -> bool:
        """Whether `source` is a kind of beginning, not a folder."""
        return re.fullmatch(r"layers:\d+(,\d+)*|random:\d+|preset:\w+", self.source) is not None


def load_model(folder: str, dtype: torch.dtype | str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A transformers model in evaluation mode; raises `ModelLoadError`."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    # The library raises whatever its configuration and weight code raises.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"{folder} cannot be loaded by transformers: {reason or type(error).__name__}") from error
    loaded: PreTrainedModel = model.eval()
    return loaded


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model's weights."""
    nn.Module.to(model, device)  # the library's own method takes more, and is typed for none of it


def make_draft(init: Init, target: PreTrainedModel, rows: Sequence[Tensor]) -> PreTrainedModel:
    """The draft in float32 on the target's device; rows of ids [1, T] calibrate what is kept.

    Raises `ConfigError` for an unknown or impossible `source`, `ModelLoadError` where the target cannot be cut.
    """
    if not init.is_cut:
        return continue_draft(init.source, target, init.shares_embedding)
    kind, _, what = init.source.partition(":")
    numbers = [int(number) for number in what.split(",")]
    count = len(decoder_layers(target))
    if len(numbers) == 1 and not 1 <= numbers[0] <= count:
        raise ConfigError(f"{init.source}: the target has {count} layers", param="init")
    if kind == "random":
        layers = list(range(numbers[0]))
    elif len(numbers) == 1:
        layers = most_important(layer_importance(target, rows), numbers[0])
    else:
        layers = numbers
    if max(layers) >= count or len(set(layers)) != len(layers):
        raise ConfigError(f"{init.source}: the target has layers 0 to {count - 1}, each once", param="init")
    draft = _empty_draft(target, layers, init)
    if kind == "layers":
        _copy_weights(target, draft, layers, rows)
    elif init.shares_embedding:
        _share(target, draft)
    return _freeze_shared(draft, bool(init.shares_embedding))


def most_important(importance: Sequence[float], count: int) -> list[int]:
    """The `count` layers of largest importance, in their order."""
    return sorted(sorted(range(len(importance)), key=lambda index: -importance[index])[:count])


def continue_draft(folder: str, target: PreTrainedModel, shares_embedding: bool | None) -> PreTrainedModel:
    """A draft as a checkpoint left it; raises `ConfigError` or `ModelLoadError`."""
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"a draft begins as layers:N, layers:I,J,..., random:N or a checkpoint folder, not {folder!r}", param="init"
        )
    checkpoint = open_checkpoint(folder)
    shared = bool(checkpoint.config.get(SHARES_EMBEDDING))
    draft = _load_sharing(checkpoint) if shared else load_model(folder, torch.float32)
    place(draft, target.device)
    shares = shared if shares_embedding is None else shares_embedding
    if shared or shares:
        _share(target, draft)
    elif _table(draft).shape[0] != _table(target).shape[0]:
        raise ConfigError(f"{folder} has another vocabulary than the target", param="init")
    return _freeze_shared(draft, shares)


def _load_sharing(checkpoint: Checkpoint) -> PreTrainedModel:
    """A draft whose checkpoint lacks embedding and head: the library would take it for a broken one."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    draft: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reader = TensorReader(checkpoint, lambda phase, done, total: None)
    try:
        state = {name: reader.read(name) for name in checkpoint.tensors}
    finally:
        reader.close()
    try:
        missing = set(draft.load_state_dict(state, strict=False).missing_keys) - shared_names(draft)
    except RuntimeError as error:
        raise ModelLoadError(f"{checkpoint.name}: {' '.join(str(error).split())[:300]}") from error
    if missing:
        raise ModelLoadError(f"{checkpoint.name} lacks the tensor {min(missing)} ({len(missing)} missing in all)")
    return draft


def shared_names(draft: PreTrainedModel) -> set[str]:
    """Names of the tensors of embedding and head."""
    tables = {id(_table(draft)), id(_head(draft))}
    return {name for name, tensor in draft.named_parameters(remove_duplicate=False) if id(tensor) in tables}


def _empty_draft(target: PreTrainedModel, layers: Sequence[int], init: Init) -> PreTrainedModel:
    """A model of the target's kind with fresh weights."""
    config: Any = type(target.config).from_dict(target.config.to_dict())
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[index] for index in layers]
    narrow_config(text, Widths.of(target), init.hidden, init.mlp, init.kv_heads)
    try:
        draft: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # the library's way of refusing widths that do not go together
        raise ConfigError(f"the draft cannot be so wide: {' '.join(str(error).split())[:300]}") from error
    place(draft, target.device)
    return draft.eval()


@torch.no_grad()
def _copy_weights(
    target: PreTrainedModel, draft: PreTrainedModel, layers: Sequence[int], rows: Sequence[Tensor]
) -> None:
    """Give the draft the target's layers and all that stands beside them, as much of each as it has room for."""
    theirs, ours = decoder_layers(target), decoder_layers(draft)
    originals = [theirs[index] for index in layers]
    states = [dict(layer.state_dict()) for layer in originals]
    inner = {id(p) for p in theirs.parameters()}
    beside = {name: p.detach() for name, p in target.named_parameters() if id(p) not in inner}
    Narrowing(target, Widths.of(draft), rows).apply(originals, states, beside)
    for number, state in enumerate(states):
        try:
            ours[number].load_state_dict(state)
        except RuntimeError as error:  # weights of the attention that go by heads, but are none of its projections
            raise ModelLoadError(f"{type(target).__name__} cannot be cut so: {str(error).splitlines()[-1]}") from error
    for name, tensor in beside.items():
        draft.get_parameter(name).copy_(tensor)


def _table(model: PreTrainedModel) -> nn.Parameter:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _head(model: PreTrainedModel) -> nn.Parameter:
    head = model.get_output_embeddings()
    if head is None or not isinstance(head.weight, nn.Parameter):
        raise ModelLoadError(f"{type(model).__name__} has no output head of its own")
    return head.weight


@torch.no_grad()
def _share(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Copy the target's embedding and head; raises `ConfigError` if they do not fit."""
    for mine, theirs in ((_table(draft), _table(target)), (_head(draft), _head(target))):
        if mine.shape != theirs.shape:
            raise ConfigError(
                f"the draft cannot share the target's embedding: {list(mine.shape)} against {list(theirs.shape)}",
                param="share_embedding",
            )
        mine.copy_(theirs)


def _freeze_shared(draft: PreTrainedModel, shares: bool) -> PreTrainedModel:
    """Fix embedding and head if they are the target's, and say so in the configuration."""
    setattr(draft.config, SHARES_EMBEDDING, shares)
    for parameter in (_table(draft), _head(draft)):
        parameter.requires_grad_(not shares)
    return draft
