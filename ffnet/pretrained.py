"""Saves and loads models with their weights, as a folder or a repository on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_checkpoint
from .folding import reparameterize
from .registry import create_model

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.pth")  # the second if safetensors is not installed


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Saves a model made by `ffnet.create_model`, as it is or reparameterised: ``config.json`` and its weights.

    Each file replaces an existing one only once it is complete.

    Raises:
        ValueError: If it was made in another way, has arguments that JSON cannot represent, or its parameters have been
            changed since.
    """
    config, folder = _config_of(model), Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    name = WEIGHTS[0] if _has_safetensors() else WEIGHTS[1]
    part = folder / f".{name}.{os.getpid()}.part"
    try:
        if name == WEIGHTS[0]:
            from safetensors.torch import save_file

            save_file({key: value.clone() for key, value in state.items()}, part, metadata={"format": "pt"})
        else:
            torch.save({"state_dict": state}, part)
        part.replace(folder / name)
        part.write_text(json.dumps(config, indent=2) + "\n")
        part.replace(folder / CONFIG)
    finally:
        part.unlink(missing_ok=True)


def from_pretrained(source: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any) -> Any:
    """Loads a model, in eval mode, from a folder written by `save_pretrained` or a repository on the Hub.

    Args:
        source: The folder, or a repository's name, ``"user/name"``, which huggingface_hub downloads.
        revision: Branch, tag or commit of the repository.
        **kwargs: Arguments of the model's class that replace those it was saved with.

    Raises:
        FileNotFoundError: If there is no such folder and huggingface_hub is not installed.
        ValueError: If the folder does not hold a model of this package.
    """
    folder = Path(source) if Path(source).is_dir() else _downloaded(source, revision)
    try:
        config = json.loads((folder / CONFIG).read_text())
        name, arguments, is_folded = config["model"], config["arguments"], config["reparameterized"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: expected a {CONFIG} as ffnet.save_pretrained writes it: {error!r}") from error
    weights = next((folder / known for known in WEIGHTS if (folder / known).is_file()), None)
    if weights is None:
        raise ValueError(f"{source}: expected {' or '.join(WEIGHTS)} beside {CONFIG}")
    model = create_model(name, **{**arguments, **kwargs}).eval()
    if is_folded:
        model = reparameterize(model)
    load_checkpoint(model, weights)
    return model


def push_to_hub(
    model: nn.Module, repo_id: str, *, private: bool | None = None, token: str | None = None, message: str | None = None
) -> str:
    """Saves a model like `save_pretrained` and uploads it to a repository on the Hub, which is created if needed.

    Returns:
        The commit's address.

    Raises:
        ImportError: If huggingface_hub is not installed.
        ValueError: As `save_pretrained`.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("ffnet.push_to_hub needs huggingface_hub (pip install huggingface_hub)") from error
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message or f"Upload {type(model).__name__}"
        )
    return str(getattr(commit, "commit_url", commit))


def _downloaded(source: str | os.PathLike[str], revision: str | None) -> Path:
    name = os.fspath(source)
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"no folder {name}; of a repository of the Hub, huggingface_hub is needed (pip install huggingface_hub)"
        ) from error
    return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG, *WEIGHTS]))


def _has_safetensors() -> bool:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        return False
    return True


def _config_of(model: nn.Module) -> dict[str, Any]:
    made = getattr(model, "created_as", None)
    if not isinstance(made, dict):
        raise ValueError(f"expected a model of ffnet.create_model, got {type(model).__name__}")
    arguments = dict(made["arguments"])
    classes = getattr(model, "num_classes", None)  # the head may have been replaced
    if isinstance(classes, int):
        arguments["num_classes"] = classes
    arguments.pop("device", None)
    try:
        arguments = json.loads(json.dumps(arguments))
    except TypeError as error:
        raise ValueError(f"its arguments cannot be written as JSON: {error}") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for is_folded in (False, True):
        again = create_model(made["model"], **{**arguments, "device": "meta"}).eval()
        again = reparameterize(again) if is_folded else again
        if {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes:
            return {"model": made["model"], "arguments": arguments, "reparameterized": is_folded}
    raise ValueError(f"its parameters are not those of {made['model']} with the arguments {arguments}")
