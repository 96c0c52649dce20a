"""Which model names are folders of this machine. Both processes ask: one for the tokenizer, one for the weights."""

from pathlib import Path

from .errors import ModelLoadError


def model_folder(name: str) -> Path | None:
    """The folder that `name` means; None where it can only be a hub name (owner/name).

    Raises `ModelLoadError` where it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{name} is a file; a model folder in Hugging Face format is needed")
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ModelLoadError(f"no such model folder: {name}")
    return None
