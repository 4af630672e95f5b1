"""The command line: ``mlxsae demo | harvest | train | eval | info | bench``.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed (one sentence on stderr says why),
2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train an SAE on the bundled model and write a report",
    "harvest": "store a language model's activations on disk",
    "train": "train an SAE on a language model's activations",
    "eval": "judge a saved SAE inside its language model",
    "info": "show versions, devices, ops and backends",
    "bench": "time a training step",
}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# What bad input and the outside world raise. Anything else is a fault of ours and keeps its traceback.
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)


def _parser(wanted: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command that is asked for is imported, so that ``--help`` and ``--version`` are quick."""
    parser = argparse.ArgumentParser(prog="mlxsae", description="Sparse autoencoders on Apple's MLX.")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    asked = next((word for word in wanted if not word.startswith("-")), None)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name == asked:
            module = importlib.import_module(f"mlxsae.cli.{name}_command")
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser(arguments)
        options = parser.parse_args(arguments)
        if options.version:
            import mlxsae

            print(mlxsae.__version__)
            return OK
        if options.command is None:
            parser.print_help(sys.stderr)
            return USAGE
        options.argv = arguments
        return options.run(options) or OK
    except SystemExit as e:  # argparse: 0 after --help, 2 on wrong usage
        return e.code if isinstance(e.code, int) else USAGE
    except KeyboardInterrupt as e:
        print(f"\nmlxsae: interrupted. {e}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `mlxsae info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except _EXPECTED as e:
        said = " ".join(str(e).split()) or type(e).__name__
        print(f"mlxsae: error: {said}", file=sys.stderr)
        return FAILED
