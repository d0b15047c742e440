"""Where a base is loaded from: a folder, the hub, or the small base that comes with Graft; and what its errors mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graft.config.base import BaseConfig
from graft.errors import GraftError, MissingExtra, listed, nearest
from graft.utils.hub import cached_if_silent

SEEDLING = "seedling"


def source_of(config: BaseConfig) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub name to load from, and the options for `from_pretrained`."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.model == SEEDLING:
        from graft import seedling

        return str(seedling.path()), options
    path = Path(config.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = (
                "; it holds an adapter, so name the adapter's base" if (path / "adapter_config.json").is_file() else ""
            )
            raise GraftError(f"base.model: the folder {path} holds no model (config.json is missing){hint}")
        return str(path), options
    if path.is_file():
        raise GraftError(f"base.model: {path} is a file; name the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model) or config.model.startswith("."):
        raise GraftError(f"base.model: there is no folder {path}.{near(path)}")
    if config.revision is not None:
        options["revision"] = config.revision
    return config.model, options


def near(path: Path) -> str:
    """Return a sentence with the folder that was probably meant, or with those that exist."""
    parent = next((parent for parent in path.parents if parent.is_dir()), None)
    if parent is None:
        return ""
    folders = [found.name for found in parent.iterdir() if found.is_dir() and not found.name.startswith(".")]
    missing = path.relative_to(parent).parts[0]
    if missing == str(path) and nearest(missing, [SEEDLING]):
        return f" Did you mean '{SEEDLING}'?"
    if found := nearest(missing, folders):
        return f" Did you mean '{parent / found}'?"
    return f" {'This folder' if parent == Path() else parent} holds {listed(sorted(folders)) or 'no folders'}."


@contextmanager
def explained(config: BaseConfig, source: str) -> Iterator[None]:
    """Turn transformers' errors into a `GraftError` that says what could not be loaded, and from where."""
    local = Path(source).is_dir()
    try:
        with nullcontext() if local else cached_if_silent():
            yield
    except GraftError:
        raise
    except ImportError as error:
        if config.attention == "flash_attention_2":
            raise MissingExtra("flash_attn", "gpu") from error
        raise GraftError(f"base.model '{config.model}' needs a package that is not installed: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason and not config.trust_remote_code:
            raise GraftError(
                f"base.model '{config.model}' comes with its own code, which would run on this machine. If you trust it, set "
                "base.trust_remote_code: true"
            ) from error
        if local:
            raise GraftError(f"base.model: the model in {source} cannot be loaded: {reason}") from error
        raise GraftError(
            f"base.model: '{config.model}' is not a folder here, and reading it from the hub failed: {reason}{near(Path(source))}"
        ) from error
