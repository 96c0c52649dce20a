"""Writes a draft as a checkpoint: a plain one that transformers loads, or one without the tensors it shares."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.native import SHARES_EMBEDDING
from .draft_init import shared_names


def export_draft(
    draft: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    *,
    complete: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> None:
    """Write weights in `dtype` and configuration, each file at once; what else is in the folder stays. Raises `OSError`
    or `SafetensorError` where there is no room.

    A draft that shares the target's embedding leaves it out unless `complete`. With a tokenizer the folder can be
    served by itself. `card` becomes README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    omits = bool(getattr(draft.config, SHARES_EMBEDDING, False)) and not complete
    left_out = shared_names(draft) if omits else set()
    state = {n: p.detach().to("cpu", dtype) for n, p in draft.named_parameters() if n not in left_out}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        staged = Path(temporary)
        draft.save_pretrained(staged, state_dict=state)
        _describe(staged / "config.json", dtype, omits)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, staged)
        if card is not None:
            (staged / "README.md").write_text(card, encoding="utf-8")
        new = {path.name for path in staged.iterdir()}
        for name in sorted(new):
            (staged / name).chmod(0o644)
            os.replace(staged / name, folder / name)
        for old in folder.glob("model*.safetensors*"):
            if old.name not in new:
                old.unlink()


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the library has no type of its own for a full disk
        raise OSError(f"cannot write the tokenizer: {error}") from error


def _describe(path: Path, dtype: torch.dtype, omits: bool) -> None:
    """Put into config.json what the tensors are."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop(SHARES_EMBEDDING, None)
    if omits:
        config[SHARES_EMBEDDING] = True
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_generation_config(target: Path, folder: Path) -> None:
    """The target's end tokens are the draft's."""
    source = target / "generation_config.json"
    if source.is_file():
        shutil.copyfile(source, folder / source.name)
