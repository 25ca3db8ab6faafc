"""Trained evaluation networks as files, to be used without a recipe, a run or an engine.

A folder with two files: `network.json` says what to construct, `network.safetensors` holds the weights, and neither can
hold code. The evaluation run calls `export_network`; users call `load_network`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from mlo.errors import MloError
from mlo.files import replacing, write_text
from problems.search_spaces.evaluation import EvaluationNetwork
from problems.search_spaces.genotypes import Genotype
from problems.search_spaces.stems import Stem

DESCRIPTION = "network.json"
WEIGHTS = "network.safetensors"
_AUXILIARY = "auxiliary_head."


class _Description(BaseModel):
    """What `network.json` says: the arguments of `EvaluationNetwork`, and which weights belong to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    genotype: dict[str, Any]
    num_classes: PositiveInt
    channels: PositiveInt
    num_cells: PositiveInt
    in_channels: PositiveInt
    stem: Stem
    weights_sha256: str


def export_network(network: EvaluationNetwork, path: str | os.PathLike[str]) -> Path:
    """Write a network into a folder, without the auxiliary head.

    Args:
        network: on any device, in any mode, compiled or not; left as it is.
        path: of the folder, made where it is missing; an older network in it is replaced.

    Returns:
        The folder.

    Raises:
        MloError: its weights are not those of the network that it was constructed as: `load_network` could not read it.

    Example:
        >>> import tempfile
        >>> from problems.search_spaces.genotypes import PUBLISHED
        >>> network = EvaluationNetwork(PUBLISHED["PDARTS"], num_classes=10, channels=4, num_cells=3)
        >>> sorted(file.name for file in export_network(network, tempfile.mkdtemp()).iterdir())
        ['network.json', 'network.safetensors']
    """
    original: EvaluationNetwork = getattr(network, "_orig_mod", network)
    shape = original.shape
    tensors = {name: t for name, t in original.state_dict().items() if not name.startswith(_AUXILIARY)}
    with torch.device("meta"):
        expected = EvaluationNetwork(**vars(shape)).state_dict()
    for name in sorted(tensors.keys() | expected.keys()):
        found, wanted = (None if name not in own else tuple(own[name].shape) for own in (tensors, expected))
        if found != wanted:
            raise MloError(
                f"expected an evaluation network as it was constructed; found {name} of shape {found or 'none'} in the "
                f"place of {wanted or 'none'}. Save a changed network with torch.save."
            )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: modules may have weights in common, which a file of this format cannot.
    weights = save({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()})
    description = _Description(
        genotype=shape.genotype.to_json(),
        num_classes=shape.num_classes,
        channels=shape.channels,
        num_cells=shape.num_cells,
        in_channels=shape.in_channels,
        stem=shape.stem,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(weights)
    write_text(folder / DESCRIPTION, description.model_dump_json(indent=2) + "\n")
    return folder


def load_network(path: str | os.PathLike[str]) -> EvaluationNetwork:
    """Read a network that `export_network` wrote.

    Args:
        path: of the folder.

    Returns:
        The network, a plain `torch.nn.Module` on the CPU, in evaluation mode, without an auxiliary head.
        `network(images).main` are its logits, of shape (batch, classes).

    Raises:
        MloError: a file is missing, damaged or none of ours.
    """
    folder = Path(path)
    text, weights = (_read(folder, name) for name in (DESCRIPTION, WEIGHTS))
    where = folder / DESCRIPTION
    try:
        description = _Description.model_validate_json(text)
        genotype = Genotype.from_json(description.genotype)
        arguments = description.model_dump(exclude={"format", "genotype", "weights_sha256"})
        with torch.device("meta"):  # draws no initial weights, which would move the caller's random generators
            network = EvaluationNetwork(genotype, **arguments)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise MloError(
            f"{where}: expected the description of an exported network; {place + ': ' if place else ''}{first['msg']}. "
            f"Export it again."
        ) from error
    except (ValueError, TypeError, RuntimeError) as error:  # of torch, for sizes out of all bounds
        raise MloError(f"{where}: expected the description of an exported network; {error}") from error
    where = folder / WEIGHTS
    if hashlib.sha256(weights).hexdigest() != description.weights_sha256:
        raise MloError(
            f"{where}: expected the weights that {DESCRIPTION} was written with; found others, or damaged ones. Copy "
            f"or export the folder again."
        )
    try:
        network.load_state_dict(load(weights), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise MloError(f"{where}: expected the weights of the network in {DESCRIPTION}; {error}") from error
    return network.eval()


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise MloError(
            f"{folder}: expected the folder of an exported network, with {DESCRIPTION} and {WEIGHTS}; {name} cannot be "
            f"read: {error.strerror}"
        ) from error
