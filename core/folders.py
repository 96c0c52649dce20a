"""Which model names are folders of this machine. Both processes ask: one for the tokenizer, one for the weights."""

import os
from pathlib import Path

from .errors import ModelLoadError


def model_folder(name: str) -> Path | None:
    """The folder that `name` means; None where it can only be a hub name (owner/name).

    Raises `ModelLoadError` where it is neither, or a folder that may not be read.
    """
    path = Path(name).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # on the way to it
        raise ModelLoadError(f"{name} cannot be read: {error.strerror}") from error
    if is_folder:
        if not os.access(path, os.R_OK | os.X_OK):
            raise ModelLoadError(f"{name} cannot be read: Permission denied")
        return path
    if exists:
        raise ModelLoadError(f"{name} is a file; a model folder in Hugging Face format is needed")
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ModelLoadError(f"no such model folder: {name}")
    return None
