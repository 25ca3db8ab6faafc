"""Checkpoint files: written whole or not at all, verified when read, without running foreign code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mlo.errors import CheckpointError
from mlo.files import replacing

FORMAT = 3


def write_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a state made of tensors, numbers, strings, lists and dictionaries, atomically, and read it back.

    Raises:
        CheckpointError: the folder cannot be written to, or the state holds objects of another kind.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            torch.load(temporary, map_location="cpu", weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{target}: expected the states of modules, optimizers, schedulers and data to be made of tensors, "
            f"numbers, strings, lists and dictionaries; found something else ({error})"
        ) from error
    except (OSError, RuntimeError) as error:  # torch raises the latter where a disk is full
        raise CheckpointError(
            f"{target}: the checkpoint could not be written ({error}); the one before it is untouched"
        ) from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or of a later format.
    """
    target = Path(path)
    try:
        with zipfile.ZipFile(target) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{target}: the checkpoint is damaged (in {damaged}); use an earlier one")
        state = torch.load(target, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{target}: expected a checkpoint; found no file") from error
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{target}: expected a checkpoint of mlo; found a file that cannot be read ({error})"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{target}: expected a checkpoint of mlo; found another torch file")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{target}: expected checkpoint format {FORMAT}; found {state['format']}. Read it with the version of mlo "
            f"that wrote it."
        )
    return {key: value for key, value in state.items() if key != "format"}
