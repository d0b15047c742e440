"""Write what a federation made: an adapter folder, or a model where the base itself trained, with its template."""

from __future__ import annotations

from pathlib import Path

from graft.attaching.saving import save
from graft.bases.whole import write_model
from graft.federation.workplace import Workplace
from graft.training.publishing import texts_of
from graft.utils.files import new_dir


def publish(place: Workplace, folder: Path, adapter: str | None, name: str = "federated") -> Path:
    """Write an attached adapter as adapters/<name> of a folder, or the whole model as model/ (adapter: None); returns where it is."""
    template = place.data.template
    if adapter is None:
        with new_dir(folder / "model") as fresh:
            write_model(place.base, fresh)
            template.save(fresh)
        return folder / "model"
    return save(place.base.model, adapter, folder / "adapters" / name, extra_files=texts_of(template))
