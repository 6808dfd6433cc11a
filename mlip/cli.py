"""The `mlip` command: its sub-commands, and how it ends.

What does not live here: the sub-commands' arguments (commands/arguments.py) and any work
(commands/actions.py, commands/films.py). Errors of ours are one line and a stable exit code.
Nothing that needs another package is imported before it is used: what is missing is a line, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from mlip.commands.arguments import add_commands, as_sentence
from mlip.commands.doctor import install_line
from mlip.commands.options_once import Parser
from mlip.settings.typed_tree import ConfigError, require_utf8
from mlip.system.machine import limit_reached
from mlip.system.output_file import refusal
from mlip.system.stop_signal import Stopped, signals_stop
from mlip.system.unread_output import one_line, unread_output_is_lost

# sub-command -> its module (with add_arguments and run), and what it does
FOREIGN = {
    "prepare": (
        "mlip.dataloading.prepare.command",
        "turn raw downloads or your own files into shards and a manifest",
    ),
    "label": (
        "mlip.dataloading.reports.label_reports",
        "read labels of findings from reports: what each states, denies or doubts",
    ),
    "knowledge": ("mlip.commands.knowledge", "build concept tables and look into them"),
}

_SEVERAL = ("settings", "phrases", "terms")  # arguments of which there may be several
# options that name a file or folder
_PATHS = {
    name: f"--{name}"
    for name in ("out", "checkpoint", "fit", "reference", "wordings", "like", "page")
} | {"embeddings": "--in", "of": "a folder of mlip compare", "against": "--with"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; its exit code (mlip/training/lifecycle.py lists them)."""
    with unread_output_is_lost() as lost:  # `mlip prepare ... | head` prepares all the same
        try:
            with signals_stop():
                code = _main(arguments)
        except KeyboardInterrupt as error:
            stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
            print(f"mlip: {stop}", file=sys.stderr)
            code = stop.exit_code
    if lost and code == 0:  # not a reader that left: `> file` on a full disk
        print(f"mlip: the lines of this command were not written: {lost[0]}", file=sys.stderr)
        return 2
    return code


def _main(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    given = [_at_home(item) for item in (sys.argv[1:] if arguments is None else arguments)]
    # the rest belongs to the sub-commands whose arguments live in their own modules
    options, rest = parser.parse_known_args(given)
    several = next((getattr(options, n) for n in _SEVERAL if hasattr(options, n)), None)
    if several is not None:
        # argparse takes positionals only up to the first option: later ones are meant as well
        several += [item for item in rest if not item.startswith("-")]
        rest = [item for item in rest if item.startswith("-")]
    if rest and options.command not in FOREIGN:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; a setting is key=value")
    options.rest = rest
    try:
        return _run(options)
    except ImportError as error:
        told = install_line(error)
        if told is None:  # broken, not missing
            raise
        print(f"mlip {options.command}: {told}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    """The sub-command, its errors as one line; one of an import is the caller's."""
    try:
        for name, option in _PATHS.items():
            given = getattr(options, name, None)
            for path in given if isinstance(given, list) else [given]:
                require_utf8(option, str(path or ""))
                if path == "":  # the current folder: "$OUT" where OUT is not set
                    raise ConfigError(f"{option} is empty: expected the name of a file or folder")
        return int(options.run(options))
    except ImportError:
        raise
    except Exception as error:
        if told := limit_reached(error):  # first: without memory nothing can be imported
            print(f"mlip {options.command}: {one_line(told)}", file=sys.stderr)
            return 2
        from mlip.training.lifecycle import CONFIG, exit_code

        code, told = exit_code(error), str(error)
        if code == 1:
            unwritten = refusal(error, getattr(options, "out", None))
            if unwritten is None:
                raise  # not a mistake we know: the traceback is what helps
            code, told = CONFIG, unwritten
        print(f"mlip {options.command}: {one_line(told)}", file=sys.stderr)
        return code


def build_parser() -> argparse.ArgumentParser:
    about = "Medical language-image pre-training: the commands to run before and after train.py."
    epilog = (
        "`mlip COMMAND --help` lists the options of a command. Research software. Not for clinical "
        "use."
    )
    parser = Parser(prog="mlip", description=about, epilog=epilog)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_commands(commands)
    for name in FOREIGN:
        _add_foreign(commands, name, *FOREIGN[name])
    return parser


def _add_foreign(commands: Any, name: str, module: str, text: str) -> None:
    """A sub-command whose arguments its own module adds, imported only when it is asked for.

    Its module may need packages that the other commands do not.
    """
    parser = commands.add_parser(name, help=text, add_help=False)

    def run(options: argparse.Namespace) -> int:
        import importlib

        command = importlib.import_module(module)
        own = Parser(prog=f"mlip {name}", description=as_sentence(text))
        command.add_arguments(own)
        for before, given in zip([name, *options.rest], options.rest, strict=False):
            # the empty path is the current folder: "$OUT" where OUT is not set
            if given == "" or (given.startswith("--") and given.endswith("=")):
                named = given or before
                raise ConfigError(f"{named} is empty: expected a value, or leave it out")
        asked = own.parse_args(options.rest)
        options.out = getattr(asked, "out", None)  # for the line where it cannot be written
        return int(command.run(asked))

    parser.set_defaults(run=run)


def _at_home(item: str) -> str:
    """--out=~/x as --out ~/x is: a shell makes no home folder of it behind the sign."""
    option, sign, value = item.partition("=")
    is_path = option.startswith("--") and value.startswith("~/")
    return f"{option}{sign}{os.path.expanduser(value)}" if is_path else item


if __name__ == "__main__":
    sys.exit(main())
