"""The command `aligngpt`: one subcommand per module, each imported when it is asked for.

A module that serves a subcommand has `add_arguments(parser)` and `run(args) -> int`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "score": "score how well each image and its text agree, by a CLIP or SigLIP",
    "levels": "cut scores into alignment levels for stage 1",
    "preview": "print a sample's tokens, coloured by what they are",
    "chat": "answer a question about pictures, or hold a conversation",
    "doctor": "explain this machine: what is there, what is used, what to install",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; what is wrong with its input is one sentence on standard error and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="aligngpt", description="AlignGPT from the command line.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            try:
                module = import_module(f".{name}", __package__)
            except ModuleNotFoundError as error:
                return _missing(name, error)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except ModuleNotFoundError as error:
        return _missing(args.command, error)
    except (ValueError, OSError) as error:
        print(f"aligngpt {args.command}: {error}", file=sys.stderr)
        return 2


def _missing(command: str, error: ModuleNotFoundError) -> int:
    if error.name is None or error.name.split(".")[0].startswith("aligngpt"):
        raise error
    print(
        f"aligngpt {command}: the package {error.name} is not installed; aligngpt doctor says what to do",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
