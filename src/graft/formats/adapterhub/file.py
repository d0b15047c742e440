"""An AdapterHub folder: `adapter_config.json` and `pytorch_adapter.bin` or `adapter.safetensors`.

A tensor's name begins with the path of the module that hosts it in the library's own model class, and contains the adapter's name. For a
plain BertModel it still begins with `bert.encoder`, because the library's class has a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graft.architectures.site import Site
from graft.errors import GraftError
from graft.formats.foreign import AdapterFile
from graft.injection.state import site_table_of


class HubFile(AdapterFile):
    """The tensors of a folder, under the base's own module names, and the sites that they belong to."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        model: nn.Module,
        files: Sequence[str] = ("adapter.safetensors", "pytorch_adapter.bin"),
        holder: str = "adapters",
    ) -> None:
        """files: names of the weights file to try. holder: the module that holds the adapters of a sublayer by their names."""
        super().__init__(folder, config, "", files)
        self.name, self.holder, self.model, self.site_table = str(config["name"]), holder, model, site_table_of(model)
        # Rename from a model with a head to a plain one, or the other way round, as the base needs.
        outer, inner = f"{getattr(model, 'base_model_prefix', '') or '-'}.", dict(model.named_children())
        if outer[:-1] not in inner:
            self.left = {name.removeprefix(outer): tensor for name, tensor in self.left.items()}
        elif not any(name.startswith(outer) for name in self.left):
            self.left = {self._with_prefix(name, outer): tensor for name, tensor in self.left.items()}
        self.kept = dict(self.left)

    def _with_prefix(self, name: str, outer: str) -> str:
        """Turn a plain model's name into that of the model with a head. Encoder-decoders have no outer module, so some names stay."""
        return name if self._known(name) else outer + name

    def _known(self, name: str) -> bool:
        return name.split(".")[0] in dict(self.model.named_children())

    def sublayers(self, *names: str, leave_out: tuple[int, ...] = ()) -> list[tuple[Site, str]]:
        """Return (site, prefix of its adapter's tensor names) for the sublayers with these names, except in the layers left out.

        Raises `GraftError` if the base has no such sublayers.
        """
        found = []
        for name in names:
            for site in self.site_table.by_name.get(name, []):
                if site.layer not in leave_out:
                    found.append((site, self._prefix(site)))
        if not found:
            raise GraftError(f"{self.folder} has adapters at sites that this base lacks: {', '.join(names)}")
        return found

    def _prefix(self, site: Site) -> str:
        """Return the prefix of the names of a site's tensors.

        BERT and T5 keep an adapter in a module around the sublayer's last layer, decoders keep it in a container of the block.
        """
        parts = site.module.split(".")
        for end in range(len(parts), 0, -1):
            prefix = f"{'.'.join(parts[:end])}.{self.holder}.{self.name}."
            if any(name.startswith(prefix) for name in self.left):
                return prefix
        block = next((block.path for block in self.site_table.blocks if site.module.startswith(f"{block.path}.")), "")
        container = "attention_adapters" if site.name == "attn" else "output_adapters"
        return f"{block}.{container}.{self.holder}.{self.name}."

    def shared(self, name: str) -> Tensor:
        """Take a tensor that all sites share, wherever the library put it."""
        tail = f"shared_parameters.{self.name}.{name}"
        found = next((key for key in self.left if key == tail or key.endswith(f".{tail}")), tail)
        return self.take(found)
