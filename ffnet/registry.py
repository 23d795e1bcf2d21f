"""The registry of models by name."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple, TypeVar

from torch import nn

from .checkpoint import load_checkpoint

__all__ = ["ModelEntry", "create_model", "list_models", "model_entry", "register_model"]

BuildT = TypeVar("BuildT", bound=Callable[..., nn.Module])


class ModelEntry(NamedTuple):
    """What is known about a model.

    Attributes:
        build: builds it, with keyword arguments of its class; published multiply–adds are for ``config["input_size"]``.
        task: such as ``"classification"``.
        published: score in the paper, as text.
        checked: what the tests verify, as text.
    """

    build: Callable[..., nn.Module]
    task: str
    published: str
    checked: str = ""


_ENTRIES: dict[str, ModelEntry] = {}


def register_model(*, task: str, published: str, checked: str = "") -> Callable[[BuildT], BuildT]:
    """Registers a function that builds a model, under the function's name."""

    def register(build: BuildT) -> BuildT:
        _ENTRIES[build.__name__] = ModelEntry(build, task, published, checked)
        return build

    return register


def list_models(task: str | None = None) -> list[str]:
    """Names that `create_model` knows, of one task if given."""
    return [name for name, entry in _ENTRIES.items() if task in (None, entry.task)]


def model_entry(name: str) -> ModelEntry:
    """What is known about a model.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in _ENTRIES:
        raise ValueError(f"expected one of {', '.join(_ENTRIES)}, got {name!r}")
    return _ENTRIES[name]


def create_model(name: str, *, checkpoint: str | PathLike[str] | None = None, **kwargs: Any) -> Any:
    """Builds a model by name.

    Args:
        name: One of `list_models`.
        checkpoint: File to load, see `ffnet.load_checkpoint`; without it the weights are random.
        **kwargs: Arguments of the model's class that override those of the named model.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the class does not know a keyword argument.
    """
    model = model_entry(name).build(**kwargs)
    model.created_as = {"model": name, "arguments": kwargs}  # type: ignore[assignment]  # for save_pretrained
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
