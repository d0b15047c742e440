"""The method that a federation asks for."""

from __future__ import annotations

from graft.config.federation import AverageMethod, FerretMethod, KSeedMethod, LocalMethod
from graft.federation.methods.base import Method
from graft.federation.methods.differences import Differences, have_differences
from graft.federation.methods.ferret import Ferret
from graft.federation.methods.kseed import KSeed
from graft.federation.methods.local import Local
from graft.federation.methods.parameters import Parameters
from graft.federation.workplace import Workplace


def method_of(place: Workplace) -> Method:
    """Make the method of a federation on the workplace of this process."""
    method = place.federation.config.method
    if isinstance(method, KSeedMethod):
        return KSeed(place, method)
    if isinstance(method, FerretMethod):
        return Ferret(place, method)
    if isinstance(method, LocalMethod):
        return Local(place)
    if isinstance(method, AverageMethod) and method.aggregate != "naive" and have_differences(place, method):
        return Differences(place, method)
    return Parameters(place)
