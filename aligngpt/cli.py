"""The command `aligngpt`: one subcommand per module, each imported when it is asked for.

A module that serves a subcommand has `add_arguments(parser)` and `run(args) -> int`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import _problem

COMMANDS = {
    "score": "score how well each image and its text agree, by a CLIP or SigLIP",
    "pack": "pack a data set and its images into tar shards with an index and checksums",
    "levels": "cut scores into alignment levels for stage 1",
    "preview": "print a sample's tokens, coloured by what they are",
    "chat": "answer a question about pictures, or hold a conversation",
    "eval": "answer and score the benchmarks of the field",
    "convert": "move a model between AlignGPT's, the public code's and LLaVA's layout",
    "doctor": "explain this machine; with DATA, what training would drop of a data set and why",
}
_NEED_TRANSFORMERS = ("score", "preview", "chat", "eval", "convert")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; what is wrong with its input is one sentence on standard error and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="aligngpt", description="AlignGPT from the command line.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            if name in _NEED_TRANSFORMERS and _problem:
                return _unusable(name, _problem)
            try:
                module = import_module(f".{name}", __package__)
            except ModuleNotFoundError as error:
                return _unusable(name, error)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except ModuleNotFoundError as error:
        return _unusable(args.command, error)
    except KeyboardInterrupt:
        print(f"aligngpt {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"aligngpt {args.command}: {error}", file=sys.stderr)
        return 2


def _unusable(command: str, error: Exception) -> int:
    """Say which package of others is missing or broken. A missing module of our own is raised."""
    if not isinstance(error, ModuleNotFoundError):
        text = " ".join(str(error).split())
        what = f"a package that it needs is broken ({type(error).__name__}: {text})"
    elif error.name is None or error.name.split(".")[0].startswith("aligngpt"):
        raise error
    else:
        what = f"the package {error.name} is not installed"
    print(f"aligngpt {command}: {what}; aligngpt doctor says what to do", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
