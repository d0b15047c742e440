"""The frame around every verb: what other libraries say, how mistakes are reported, what `--json` and `-v` mean.

A `GraftError` is a mistake that the user can fix: the message goes to stderr and the exit code is 2. So is an error of the file system
that names a file. Any other exception is a bug in Graft: it ends in a traceback and exit code 1. With `--json`, stdout holds one JSON
value and nothing else; after an error it is `{"error": {"message": ..., "exit_code": ...}}`.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

import graft
from graft.cli.common import STOPPED, json_printed, json_stream, print_json
from graft.errors import GraftError
from graft.utils import launched
from graft.utils.streams import outlasting
from graft.utils.terminal import shown, visible

SEVERAL = ("train", "resume", "eval", "predict", "check")
"""Verbs that run in several processes."""
BUG, MISTAKE = 1, 2
"""Exit codes."""
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables that keep other libraries quiet. A user's own values stay."""


def run(command: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Run the command line with these arguments (default: those of this process) and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = given[: given.index("--")] if "--" in given else given
    verbose = bool({"-v", "--verbose"} & set(words))
    given = [*(word for word in words if word not in ("-v", "--verbose")), *given[len(words) :]]
    with outlasting(), _streams("--json" in words), _others_quiet(verbose):
        code = MISTAKE if _refuses_several(given, verbose) else _code(command, given, verbose)
        if code == STOPPED and json_stream.get() is not None and not json_printed.get():
            print_json(_error("interrupted", STOPPED))
    if launched.size() > 1:
        # Reference cycles hold groups of torch.distributed, whose threads end with them. A thread that drops the tensors of its last
        # exchange while Python exits cannot get its lock, and aborts the process.
        gc.collect()
    sys.exit(code)


def _refuses_several(arguments: Sequence[str], verbose: bool) -> bool:
    """Whether a launcher started several processes for a verb that one does; the first of them says so."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if launched.size() == 1 or verb in (*SEVERAL, None):
        return False
    if launched.rank() == 0:
        _report(
            f"graft {verb} runs in one process, but {launched.size()} were started: call it without torchrun",
            MISTAKE,
            verbose,
        )
    return True


def _code(command: Callable[..., Any], arguments: list[str], verbose: bool) -> int:
    """Run the command and return its exit code, after reporting an error."""
    try:
        return command(args=arguments, prog_name="graft", standalone_mode=False) or 0
    except GraftError as error:
        if not error.quiet:  # else another process of the run reports it
            _report(str(error), error.code, verbose)
        elif json_stream.get() is not None:
            print_json(_error(str(error), error.code))
        return error.code
    except OSError as error:
        if error.filename is None:
            _report_bug(error)
            return BUG
        _report(f"{error.filename}: {error.strerror}", MISTAKE, verbose)
    except (KeyboardInterrupt, typer.Abort):
        return STOPPED
    except Exception as error:
        usage = getattr(error, "format_message", None)  # the errors of wrong options, which print themselves
        if usage is None:
            _report_bug(error)
            return BUG
        if json_stream.get() is not None:
            print_json(_error(usage(), MISTAKE))
        elif launched.rank() == 0:  # all processes have the same options
            from typer import rich_utils

            rich_utils.rich_format_error(error)  # type: ignore[arg-type]
    return MISTAKE


def _report(message: str, code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    typer.secho(visible(f"error: {message}"), fg=typer.colors.RED, err=True)
    if json_stream.get() is not None:
        print_json(_error(message, code))


def _report_bug(error: Exception) -> None:
    traceback.print_exc()
    if json_stream.get() is not None:
        print_json(_error(f"{type(error).__name__}: {error}", BUG))


def _error(message: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "exit_code": code}}


@contextmanager
def _streams(as_json: bool) -> Iterator[None]:
    """Show control characters on both streams. For JSON, keep stdout for `print_json`: all other output goes to stderr."""
    before = sys.stdout, sys.stderr
    out = io.StringIO() if launched.rank() else before[0]  # the first process prints
    for stream in before:
        if hasattr(stream, "reconfigure"):
            # A terminal without UTF-8 shows escapes. The setting holds even where asking for the position fails afterwards: in a
            # process whose file was replaced by a pipe (`dup2`) after Python had opened the stream.
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    sys.stdout, sys.stderr = (None if stream is None else shown(stream) for stream in (out, before[1]))
    if as_json:
        sys.stdout = sys.stderr
    token, printed = json_stream.set(out if as_json else None), json_printed.set(False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        json_stream.reset(token)
        json_printed.reset(printed)


@contextmanager
def _others_quiet(verbose: bool) -> Iterator[None]:
    """Keep other libraries from printing: bars, log lines, warnings. Graft's own warnings become notes. With `verbose` all is shown."""
    last = logging.lastResort
    added = {} if verbose else {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(added)
    with warnings.catch_warnings():
        shows = warnings.showwarning
        warnings.showwarning = lambda *given: _note(*given) or (verbose and shows(*given))
        if not verbose:
            logging.lastResort = logging.NullHandler()  # type: ignore[assignment]
        try:
            yield
        finally:
            logging.lastResort = last
            for name in added:
                os.environ.pop(name, None)


def _note(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> bool:
    """Print a warning if Graft's own code raised it; return whether it did."""
    own = launched.rank() == 0 and category is UserWarning and Path(graft.__file__).parent in Path(filename).parents
    if own:
        typer.echo(f"note: {message}", err=True)
    return own
