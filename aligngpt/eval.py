"""`aligngpt eval MODEL --task pope,gqa --data DIR --out DIR`: the benchmarks of the field, answered and scored.

DIR is laid out as LLaVA's eval.zip (playground/data/eval), with each benchmark's own files and pictures in it; the
files of `aligngpt/evaluation` say which. Given again, the command goes on where it was stopped. Answers are greedy, and
pictures are prepared as in training.

    torchrun --nproc-per-node 8 -m aligngpt eval MODEL --task all --data DIR --out DIR     a share for each GPU
    aligngpt eval MODEL --task pope,mme --ablate --data DIR --out DIR                      every kind of alignment row

Refused before any answer: a file or field that is wrong, a picture that is missing, a prompt too long for the model, a
model that only captions (after stage 1), an --out that holds answers of another model or to other questions.
"""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from .config import ALIGN_MODES
from .data.tables import alone, gone_if_empty, prepare_folder, versions
from .evaluation import ablation, report, runner
from .evaluation.judge import KEY_VARIABLE, Judge
from .loading import DTYPES, load_model
from .profiling import Profile, check_folder
from .stages import ENGINE_STEP
from .team import Team, team

PROFILED_STEPS, UNPROFILED_STEPS = 32, 16  # of the engine; the first ones compile and capture
_GENERATION = ("eos_token_id", "suppress_tokens", "repetition_penalty")  # what the engine reads of generation_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt eval`."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, after stage 2")
    parser.add_argument(
        "--task",
        required=True,
        metavar="A,B",
        help=f"some of {', '.join(runner.NAMES)}; all: these without the -val ones",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder of LLaVA's eval.zip, unpacked")
    parser.add_argument("--out", required=True, metavar="DIR", help="where answers, scores and report.md go")
    parser.add_argument("--batch-size", type=int, metavar="N", help="questions answered at a time (default 32)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask about N questions of each task, evenly spaced")
    parser.add_argument(
        "--align-mode", choices=ALIGN_MODES, help="how the alignment row is made (default: as the model's config says)"
    )
    parser.add_argument("--level", type=int, metavar="K", help="fix the alignment level")
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="every mode, every fixed level, and no alignment token: a table and a plot",
    )
    parser.add_argument(
        "--judge-url",
        metavar="URL",
        help=f"an OpenAI-compatible server that judges, up to its /v1; its key goes into {KEY_VARIABLE}",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the model that judges")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="threads that read pictures, in each process (default 4, or as many as there are cores)",
    )  # fmt: skip
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help=f"write a trace and a summary of {PROFILED_STEPS} engine steps of the first process, after "
        f"{UNPROFILED_STEPS} that are not recorded",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, fp32 on a CPU)")


def run(args: argparse.Namespace) -> int:
    """`aligngpt eval`: fills the folder, then says the scores."""
    with gone_if_empty(args.out), team() as everyone, ExitStack() as stack:
        said = _run(args, everyone, stack)
    if everyone.rank == 0:
        print(said)
    return 0


def _run(args: argparse.Namespace, everyone: Team, stack: ExitStack) -> str:
    is_first = everyone.rank == 0
    out = Path(args.out)
    logging.getLogger("aligngpt.generate").setLevel(logging.CRITICAL)  # what goes wrong is raised here
    work, judge, device = everyone.agree(lambda: _begun(args, everyone))
    everyone.agree(lambda: stack.enter_context(alone("--out", out)) if is_first else None)
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    model, processor = everyone.agree(lambda: load_model(args.model, dtype))
    conditions = everyone.agree(lambda: _conditions(args, model, processor))
    measured = everyone.agree(lambda: runner.needed_length(work, processor, model, everyone.rank, everyone.size))
    length = max(everyone.gather(measured))
    batch_size = min(args.batch_size or 32, max(len(piece.chosen) for piece in work))
    engine = everyone.agree(lambda: runner.make_engine(model.to(device), processor, batch_size, length))
    about = everyone.agree(lambda: _about(args, conditions, model, processor, dtype) if is_first else {})
    how = {
        "model": "/".join(Path(args.model).resolve().parts[-2:]),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processes": everyone.size,
        "batch_size": batch_size,
        "versions": versions("torch", "transformers", "tokenizers", "pillow"),
        "judge": judge.describe() if judge else None,
    }
    going = runner.Run(out, Path(args.data), engine, everyone, about, how, args.workers, judge)
    everyone.agree(lambda: runner.claim(going) if is_first else None)
    with ExitStack() as profiled:
        if args.profile is not None and is_first:
            profile = Profile(args.profile, device, unit=ENGINE_STEP, skip=UNPROFILED_STEPS, record=PROFILED_STEPS)
            profiled.enter_context(profile)
        results = runner.run_tasks(going, work, conditions)
    return everyone.agree(lambda: _reported(args, going, results) if is_first else "")


def _begun(args: argparse.Namespace, everyone: Team) -> tuple[list[runner.Work], Judge | None, torch.device]:
    """All that can be refused without the model."""
    for flag, value in (
        ("--batch-size", args.batch_size),
        ("--limit", args.limit),
        ("--workers", args.workers),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it needs a whole number of at least 1")
    if args.ablate and (args.level is not None or args.align_mode):
        raise ValueError("--ablate is given beside --level or --align-mode; it tries them all")
    if not Path(args.data).is_dir():
        raise ValueError(f"--data is {args.data!r}, which is no folder; it needs LLaVA's eval.zip, unpacked")
    if (args.judge_url is None) != (args.judge_model is None):
        raise ValueError("--judge-url and --judge-model need each other; only one of them is given")
    judge = None
    if args.judge_url is not None:
        try:
            judge = Judge(args.judge_url, args.judge_model, os.environ.get(KEY_VARIABLE))
        except ValueError as error:
            raise ValueError(f"the judge's {error}") from error
    tasks = runner.find_tasks(args.task)
    if args.profile is not None:
        if Path(args.profile).resolve() == Path(args.out).resolve():
            raise ValueError(f"--profile is {args.profile}, which is --out too; it needs a folder of its own")
        check_folder("--profile", args.profile)
    device = everyone.device(args.device)
    work = runner.read_all(tasks, Path(args.data), args.limit)
    prepare_folder("--out", args.out, [args.data, args.model])
    return work, judge, device


def _conditions(args: argparse.Namespace, model: Any, processor: Any) -> list[Any]:
    config = model.config
    if processor.template == "plain":
        raise ValueError(
            f"{args.model} is a model after stage 1, which only captions; benchmarks need one after stage 2"
        )
    mode = args.align_mode or config.align_mode
    if config.align_mode == "none" and mode != "none":
        raise ValueError(
            f"--align-mode is {mode}; {args.model} has align_mode 'none', and its alignment table is untrained"
        )
    if args.ablate:
        if mode == "none":
            raise ValueError(f"--ablate is given; {args.model} has align_mode 'none' and nothing to compare")
        return ablation.conditions(config.num_align_levels)
    if args.level is not None and (mode == "none" or not 0 <= args.level < config.num_align_levels):
        has = "no alignment token" if mode == "none" else f"levels 0 to {config.num_align_levels - 1}"
        raise ValueError(f"--level is {args.level}; this model has {has}")
    return [ablation.Condition("", mode, args.level)]


def _about(args: argparse.Namespace, conditions: list[Any], model: Any, processor: Any, dtype: str) -> dict[str, Any]:
    from .similarity import model_hash

    pictures, settings = processor.image_processor, model.generation_config
    fields = {name: value for name, value in processor.fields().items() if name != "align"}
    first = conditions[0]
    return {
        "model_sha256": model_hash(args.model),
        "processor": {
            **fields,
            "image_size": pictures.size,
            **{name: getattr(pictures, name) for name in ("image_aspect_ratio", "image_mean", "image_std")},
        },
        "generation": {name: getattr(settings, name) for name in _GENERATION},
        "align_mode": "all" if args.ablate else first.align_mode,
        "level": first.level,
        "dtype": dtype,
    }


def _reported(args: argparse.Namespace, going: runner.Run, results: dict[str, list[dict[str, Any]]]) -> str:
    about = {"model": going.how["model"], **going.about, **going.how, "limit": args.limit}
    if args.ablate:
        written = ablation.write_ablation(going.out, about, results)
        return "\n".join([ablation.console(results), *map(str, written)])
    here = results[""]
    others = runner.finished(going.out, [result["task"] for result in here])
    path = report.write_report(going.out, about, [*here, *others])
    return f"{report.console(here)}\n{path}"
