"""The command ``tsynd``: run, predict, synthesize, train, pack, evaluate, experiment, export, push, info."""

from __future__ import annotations

import io
import sys
from collections import Counter
from typing import Annotated, NoReturn

try:
    import rich  # noqa: F401
    import typer
except ImportError:
    print("tsynd: the command line needs typer and rich: pip install 'tsynd[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from tsynd.cli.evaluate import evaluate
from tsynd.cli.experiment import LISTS, experiment
from tsynd.cli.export import export
from tsynd.cli.info import info
from tsynd.cli.pack import pack
from tsynd.cli.predict import predict
from tsynd.cli.push import push
from tsynd.cli.run import run
from tsynd.cli.synthesize import synthesize
from tsynd.cli.train import train
from tsynd.utils.errors import InputError, MissingExtraError
from tsynd.utils.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="tsynd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tsynd {__version__}")
        raise typer.Exit


@app.callback()
def _first(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Targeted synthetic images for small medical data sets (TSynD)."""


for command in (run, predict, synthesize, train, pack, evaluate, experiment, export, push, info):
    app.command()(command)


def _spread(arguments: list[str]) -> list[str]:
    """``--arms a b`` as ``--arms a --arms b``: the parser takes one value per flag. ``--arm`` is ``--arms``.

    Raises:
        InputError: an option that takes one value is given twice; the parser would drop the first.
    """
    arguments = [f"{argument}s" if f"{argument}s" in LISTS else argument for argument in arguments]
    flags = Counter(argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    if twice := [flag for flag, count in flags.items() if count > 1 and flag not in LISTS]:
        hint = "; several columns are joined by commas" if twice[0] == "--label-column" else ""
        raise InputError(f"{twice[0][2:].replace('-', '_')}: {twice[0]} is given twice, wanted once{hint}")
    spread: list[str] = []
    flag, fresh = "", False
    for argument in arguments:
        if argument.startswith("--"):
            flag, fresh = (argument if argument in LISTS else ""), True
        elif flag and not fresh:
            spread.append(flag)
        else:
            fresh = False
        spread.append(argument)
    return spread


def _fail(message: str, code: int) -> NoReturn:
    print(f"tsynd: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command; an input that cannot be used ends with one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path need not be text
    try:
        code = app(_spread(sys.argv[1:]), standalone_mode=False) or 0
        if code == 130:  # the parser swallowed the interrupt
            raise KeyboardInterrupt
        raise SystemExit(code)
    except (InputError, MissingExtraError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command takes it up again", 130)
    except Exception as error:
        show = getattr(error, "show", None)  # the parser's own errors know how to print themselves
        if show is None or not hasattr(error, "exit_code"):
            raise
        show()
        raise SystemExit(error.exit_code) from None
