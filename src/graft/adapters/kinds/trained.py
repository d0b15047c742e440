"""A trained adapter by reference: frozen, beside what trains on top of it.

    adapters: [{from: runs/math}, {kind: lora, rank: 8}]          a second adapter learns what the first one lacks

The adapter computes as it did, in evaluation mode, and nothing of it trains. A saved adapter holds the folder's name and the digest of its
weights, not the weights. So the folder has to be there when it is loaded, and to hold the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from graft.adapters.base import Adapter, AdapterConfig, Shared
from graft.adapters.composite import Composite, Wrapper, WrapsAttention, WrapsExperts, WrapsPrompt, wrap
from graft.adapters.files import CONFIG, WEIGHTS
from graft.adapters.filling import to_be_filled
from graft.architectures.site import SiteSpec
from graft.errors import GraftError
from graft.utils.files import checksum
from graft.utils.strict_json import read_object


class Trained(Composite):
    """An adapter that was trained before, from its folder. It is frozen; what it computes is the start of what trains beside it."""

    takes_several = True
    suits = "Training a second adapter on top of a first one, without merging the first into the base."

    kind: Literal["trained"] = "trained"
    folder: str = Field(min_length=1)
    """The adapter's folder, as Graft wrote it, or a run folder with one adapter. `from` in a list of adapters means the same."""
    frozen: Literal[True] = True
    """A trained adapter stays as it is. To train it further, start from a copy (`graft jobs clone`)."""
    digest: str | None = None
    """SHA-256 of the weights, by default the one that the folder was written with. Attaching and loading compare it with the file."""
    part: int = Field(default=0, ge=0)
    """The number of the part that this is, if the adapter in the folder is a stack."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Take the inner config and the digest from the folder, unless they are there already."""
        if isinstance(value, Mapping) and "of" not in value and isinstance(value.get("folder"), str):
            folder, header = _header(Path(value["folder"]))
            digest = header.get("checksum") or checksum(folder / WEIGHTS)  # attaching compares it with the file
            return {"digest": digest, **value, "folder": str(folder), "of": header["adapter"]}
        return value

    def parts(self) -> tuple[AdapterConfig, ...]:
        inner = self.of.parts()
        if inner == (self.of,):
            return (self,)
        return tuple(
            self.model_copy(update={"of": each, "sites": each.sites, "part": n}) for n, each in enumerate(inner)
        )

    @property
    def folds(self) -> bool:
        return self.of.folds

    def collapsed(self) -> AdapterConfig:
        return self

    @property
    def publishes_shared(self) -> bool:
        return True

    @property
    def starts_as_identity(self) -> bool:
        return False

    @property
    def needs_gradients(self) -> bool:
        return False

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        shared = self.of.build_shared(specs)
        return None if shared is None else HeldShared(shared)

    def build(self, spec: SiteSpec) -> Adapter:
        with to_be_filled():
            of = self.of.build(spec)
        return wrap(spec, of, HeldAround, HeldAttention, HeldPrompt, HeldExperts)


def _header(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the adapter's own folder, and its config file. Raises `GraftError` if there is none, or several, or another library's."""
    if not (folder / CONFIG).is_file() and (folder / "adapters").is_dir():
        found = sorted(each for each in (folder / "adapters").iterdir() if (each / CONFIG).is_file())
        if len(found) != 1:
            names = ", ".join(each.name for each in found) or "none"
            raise GraftError(
                f"{folder} is a run with several adapters or none ({names}): name one, as {folder}/adapters/NAME"
            )
        folder = found[0]
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise GraftError(f"{folder} holds no adapter: {file} is missing")
    header = read_object(folder / CONFIG)
    if header.get("format") != "graft" or not isinstance(header.get("adapter"), Mapping):
        raise GraftError(f"{folder} does not hold one adapter in Graft's own format: convert it with graft import")
    return folder, header


class Held(nn.Module):
    """Holds a module out of sight: what walks an adapter's parameters, tensors and penalties does not meet it. It still moves along."""

    held: nn.Module

    def hide(self, name: str) -> None:
        """Take a submodule out of sight."""
        held = self._modules.pop(name)
        assert held is not None
        self.__dict__[name] = self.__dict__["held"] = held.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.held._apply(fn)
        return super()._apply(fn, recurse)


class HeldShared(Held, Shared):
    """The module that all sites of a trained adapter share."""

    def __init__(self, of: Shared) -> None:
        super().__init__()
        self.of = of
        self.hide("of")


class HeldAround(Held, Wrapper):
    """A trained adapter at one site."""

    def __init__(self, spec: SiteSpec, of: Adapter) -> None:
        super().__init__(spec, of)
        self.hide("of")

    def inner(self) -> Mapping[str, Adapter]:
        return {}

    @property
    def acts_before(self) -> bool:
        return self.of.acts_before

    def on_install(self, around: Any) -> None:
        super().on_install(around)
        self.of.on_install(around)
        self.of.eval().requires_grad_(False)

    def share(self, shared: Shared) -> None:
        assert isinstance(shared, HeldShared)
        self.of.share(shared.held)  # pyright: ignore[reportArgumentType]

    def check_filled(self) -> None:
        self.of.check_filled()

    def to_save(self) -> dict[str, Tensor]:
        return {}


class HeldAttention(HeldAround, WrapsAttention):
    """A trained adapter in an attention module."""


class HeldPrompt(HeldAround, WrapsPrompt):
    """Trained virtual tokens before the sequence."""


class HeldExperts(HeldAround, WrapsExperts):
    """A trained adapter of the weights of experts."""
