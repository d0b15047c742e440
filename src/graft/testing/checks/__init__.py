"""The promises of the adapter contract, each as a plain function `check_...(case)`."""

from graft.testing.checks.promise import CHECKS, Check

# Importing a file enters its checks. The order is that of the report: from what a kind gets wrong first to what takes longest.
# isort: off
from graft.testing.checks import output as output
from graft.testing.checks import training as training
from graft.testing.checks import saving as saving
from graft.testing.checks import merging as merging
from graft.testing.checks import many as many
from graft.testing.checks import parents as parents
from graft.testing.checks import numerics as numerics
from graft.testing.checks import generation as generation
from graft.testing.checks import compiling as compiling
# isort: on

__all__ = ["CHECKS", "Check"]
