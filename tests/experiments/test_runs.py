"""The experiments' jobs: what they run, what counts as done, what is collected; and `python -m experiments` whole."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from demo.jobs import Job, RunError, side_by_side
from experiments import jobs as experiments_jobs
from experiments import measure
from experiments.__main__ import chosen_arms, collect
from experiments.jobs import Seed, clear_unfinished, record, total_seconds
from experiments.plan import SIZES, STAGE_1, STAGE_2, SWAPPED, UNIFORM, CaptionArm
from training.config import TrainConfig, flat, read_command_line

ROOT = Path(__file__).parents[2]


@pytest.fixture
def seed(tmp_path):
    (tmp_path / "jobs").mkdir()
    return Seed(tmp_path, 3, SIZES["quick"])


def test_every_job_stands_on_jobs_before_it_and_writes_its_own_result(seed):
    jobs = seed.jobs(STAGE_1, STAGE_2)
    there: set[Path] = set()
    for job in jobs:
        assert there.issuperset(job.needs), job.name
        for path in (Path(word) for word in job.command if word.startswith(f"{seed.folder}/")):
            assert any(belongs(path, result) for result in (*there, job.result)), (job.name, path)
        assert job.result not in there
        there.add(job.result)
    assert len({job.name for job in jobs}) == len({job.result for job in jobs}) == len(jobs)
    kinds = Counter(
        word for job in jobs for word in job.command if word in ("training/pretrain.py", "training/finetune.py")
    )
    assert kinds == {"training/pretrain.py": len(STAGE_1), "training/finetune.py": len(STAGE_2)}
    llms = {job.result.name: job.command[8:] for job in jobs if "demo.language" in job.command}
    assert llms == {"llm": (), "llm-plain": ("--sureness", "0")}
    none_plain = seed.jobs([arm for arm in STAGE_1 if not arm.llm], ())
    assert sum("demo.language" in job.command for job in none_plain) == 1
    assert sum("score" in job.command for job in jobs) == 5  # once for each noise


def test_a_given_llm_and_emoji_take_the_place_of_what_is_made(tmp_path):
    """The LLM of a folder is trained on as it is, the tower learns the emoji's names; larger sizes reach commands."""
    seed = Seed(tmp_path / "run", 3, SIZES["smollm2"], tmp_path / "llm", tmp_path / "emoji")
    captions, answers = chosen_arms("", given_llm=True)
    assert len(captions) == len(STAGE_1) - 3  # without the plain LLM's
    jobs = seed.jobs(captions, answers)
    there = {tmp_path / "llm"}
    for job in jobs:
        assert there.issuperset(job.needs), job.name
        there.add(job.result)
    commands = [" ".join(job.command) for job in jobs]
    assert not any("demo.language" in command for command in commands)
    assert sum(f"--model.llm {tmp_path}/llm " in command for command in commands) == len(captions)
    assert [c.split("--optim.align-lr ")[1].split()[0] for c in commands if "align-lr" in c] == ["0.001"]  # 10 x 1e-4
    emoji = next(job for job in jobs if "experiments.emoji" in job.command)
    for job in jobs:
        reads = job.command[2] in ("demo.vision", "experiments.measure", "experiments.noise")
        assert (emoji.result in job.needs) == (reads and "scenes" not in job.command[3:4]), job.name
    tower = next(command for command in commands if "demo.vision" in command)
    assert tower.endswith(f"--pairs {seed.train_scenes}/emoji.json")

    commands = [" ".join(job.command) for job in Seed(tmp_path, 3, SIZES["large"]).jobs(STAGE_1, STAGE_2)]
    assert sum(command.endswith("--pixels 224") for command in commands) == 3  # scenes
    tower, llm = (next(c for c in commands if f"demo.{part}" in c) for part in ("vision", "language"))
    assert tower.endswith("--pixels 224 --patch 16 --width 384 --layers 6")
    assert llm.endswith("--grid 14 --width 384 --layers 6")  # 14 = 224 / 16
    assert sum("--precision bf16" in command for command in commands) == len(STAGE_1) + len(STAGE_2)


def belongs(path: Path, result: Path) -> bool:
    """Whether a file is a job's result, a part of it, the folder it lies in, or written beside it."""
    same = path.with_suffix("") == result.with_suffix("")
    return same or path.is_relative_to(result) or result.is_relative_to(path)


def configs(seed: Seed) -> dict[str, TrainConfig]:
    """What the entry points make of each training command, in a folder of files that are there but empty."""
    found = {}
    for job in seed.jobs(STAGE_1, STAGE_2):
        if "tiny" not in job.command:
            job.result.parent.mkdir(parents=True, exist_ok=True)
            for file in (job.result, job.result.with_suffix(".parquet")):
                if not file.suffix:
                    file.mkdir(exist_ok=True)
                    (file / "questions.json").touch()
                    (file / "config.json").touch()
                else:
                    file.touch()
            continue
        job.result.mkdir(parents=True)
        (job.result / "config.json").touch()
        place = job.command.index("tiny")
        stage = "pretrain" if "training/pretrain.py" in job.command else "finetune"
        found[job.name.removeprefix("seed 3: ")] = read_command_line(stage, list(job.command[place:]))
    return found


def test_arms_differ_in_nothing_but_what_they_are(seed):
    """The entry points take every command, and the settings they make of them differ where the arms do."""
    found = {name: flat(dataclasses.asdict(config)) for name, config in configs(seed).items()}
    assert len(found) == len(STAGE_1) + len(STAGE_2)
    own = {
        "run_dir",
        "model.llm",
        "data.path",
        "data.levels",
        "data.levels_hash",
        "model.align_mode",
        "model.num_levels",
    }
    of_answers = {"model.init", "model.random_table", "model.train", "model.gate_text", "optim.align_lr"}
    for stage, more in (("stage-1", set()), ("stage-2", of_answers)):
        first, *others = [config for name, config in found.items() if name.startswith(stage)]
        for other in others:
            assert {name for name in first if first[name] != other[name]} <= own | more
    noise = seed.folder / "noise"

    def settings(name: str) -> list[Any]:
        config = found[f"stage-1: {name}"]
        data, levels = (config[key].removeprefix(f"{noise}/") for key in ("data.path", "data.levels"))
        return [data, levels, config["model.align_mode"], config["model.num_levels"]]

    assert settings("8 levels") == ["uniform-0.5/pairs.json", "uniform-0.5/8-levels-count.parquet", None, 8]
    assert settings("16 levels") == ["uniform-0.5/pairs.json", "uniform-0.5/16-levels-count.parquet", None, 16]
    assert settings("8 levels, equal range")[1] == "uniform-0.5/8-levels-range.parquet"
    assert settings("random levels") == ["uniform-0.5/pairs.json", "random", None, 8]
    assert settings("one constant token") == ["uniform-0.5/2-levels-constant.json", "record", None, 2]
    assert settings("true levels, swapped 0.5") == ["swapped-0.5/8-levels-true.json", "record", None, 8]
    assert settings("no token, uniform 0.75") == ["uniform-0.75/pairs.json", "record", "none", None]
    assert settings("top quarter, biased 0.5") == ["biased-0.5/best-quarter.json", "record", "none", None]
    plain = ("8 levels, plain LLM", "no token, plain LLM", "top quarter, plain LLM")
    for name in plain:
        assert settings(name) == settings(name.removesuffix(", plain LLM"))
    for name, config in found.items():
        if name.startswith("stage-1"):
            llm = "llm-plain" if name.removeprefix("stage-1: ") in plain else "llm"
            assert config["model.llm"] == str(seed.folder / llm)
    for arm in STAGE_2:
        config = found[f"stage-2: {arm.name}"]
        start = f"stage-1/{arm.start.replace(' ', '-')}/model"
        start = "drawn/gate-drawn-x-4" if arm.name == "gate drawn x 4" else start
        assert config["model.init"] == str(seed.folder / start)
        assert config["optim.align_lr"] == (0.01 if arm.name == "gate rate x 10" else None)
        assert ("gate" in config["model.train"]) == (arm.name != "gate frozen")
        assert config["model.gate_text"] == ("all" if arm.name == "gate reads answers" else None)
        assert (config["model.align_mode"], config["model.random_table"]) == (arm.mode, arm.random_table)
    assert len({json.dumps(config, default=str, sort_keys=True) for config in found.values()}) == len(found)


def test_no_two_seeds_share_anything(tmp_path):
    """Scenes, noise, tower, LLM and both stages: every job that draws is told its seed."""
    first, second = (Seed(tmp_path, number, SIZES["quick"]).jobs(STAGE_1, STAGE_2) for number in (0, 1))
    assert {job.result for job in first}.isdisjoint(job.result for job in second)
    for one, other in zip(first, second, strict=True):
        differing = [pair for pair in zip(one.command, other.command, strict=True) if pair[0] != pair[1]]
        draws = not set(experiments_jobs.MEASURES) & set(one.command) and one.command[0] != "aligngpt"
        draws = draws and not {"constant", "best-quarter", "experiments.gate"} & set(one.command)
        assert (("--seed" in one.command), any(a.startswith("0") for a, _ in differing)) == (draws, draws), one.name


# ---------------------------------------------------------------------------------------------------- what counts


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_result_counts_if_its_command_and_code_would_make_it_again(seed, monkeypatch):
    train, measure = (
        job for job in seed.jobs(STAGE_1[:1], ()) if "tiny" in job.command or "experiments.measure" in job.command
    )
    scenes = seed.jobs(STAGE_1[:1], ())[0]
    jobs = [scenes, train, measure]
    for job in jobs:
        write(job.result if job == measure else job.result / "x")
        record(seed.run, job, 60.5)
    assert total_seconds(seed.run, jobs) == 181.5
    clear_unfinished(seed.run, jobs)
    assert all(job.result.exists() for job in jobs)

    # Of a job that was ended after its result and before it was written down, the result is made again.
    (seed.run / "jobs/seed-3-train-scenes.json").unlink()
    clear_unfinished(seed.run, jobs)
    assert [job.result.exists() for job in jobs] == [False, True, True]

    # Other measures are taken again, other models are refused, and nothing of them is touched.
    clear_unfinished(seed.run, [dataclasses.replace(measure, command=(*measure.command, "--x"))])
    assert not measure.result.exists()
    record(seed.run, measure, 1)
    write(measure.result)
    monkeypatch.setitem(experiments_jobs.CODE, "experiments.measure", ("setup.py",))
    clear_unfinished(seed.run, jobs)
    assert not measure.result.exists()
    with pytest.raises(RunError, match=r"seed 3: stage-1: 8 levels in --run-dir .* was made by another command"):
        clear_unfinished(seed.run, [dataclasses.replace(train, command=(*train.command[:-1], "elsewhere"))])
    assert train.result.exists()


def test_jobs_begin_when_what_they_need_is_there(tmp_path):
    """The third, which needs nothing, overtakes the second, which needs the first, and runs beside the first."""

    def job(name: str, code: str, *needs: str) -> Job:
        result = tmp_path / name
        code = f"import pathlib, time\nhere = pathlib.Path({str(tmp_path)!r})\n{code}\n(here / {name!r}).touch()"
        return Job(name, (sys.executable, "-c", code), result, needs=tuple(tmp_path / need for need in needs))

    ended: list[str] = []
    waits = "while not (here / 'third').exists(): time.sleep(0.01)"
    jobs = [job("first", waits), job("second", "assert (here / 'first').exists()", "first"), job("third", "")]
    side_by_side(jobs, tmp_path, lambda job, seconds: ended.append(job.name))
    assert ended == ["third", "first", "second"] or ended == ["first", "third", "second"]  # within a glance
    with pytest.raises(RunError, match=r"fifth needs .*fourth, which nothing makes"):
        side_by_side([job("fifth", "", "fourth", "first")], tmp_path)


def test_a_seeds_measures_become_its_results(seed, monkeypatch):
    jobs = seed.jobs(STAGE_1, STAGE_2)
    for number, job in enumerate(jobs):
        monkeypatch.setattr(experiments_jobs, "commit", lambda number=number: f"{number % 2}abc")
        record(seed.run, job, 6)
    for arm in STAGE_1:
        levels = ["none"] if arm.levels == "none" else map(str, range(arm.num_levels))
        split = {level: {"greedy fact precision": 0.5} for level in levels}
        content = {"validation": split, "test": split | {"of": arm.name}, "samples": [arm.name]}
        write(seed.measures(arm), json.dumps(content))
    for answer_arm in STAGE_2:
        write(seed.measures(answer_arm), json.dumps({"test": {"of": answer_arm.name}}))
        if answer_arm.mixes:
            write(seed.choosing(answer_arm), json.dumps({"own row NLL": 0.5, "of": answer_arm.name}))
    asked = []
    monkeypatch.setattr("experiments.__main__.levels_found", lambda *of: asked.append(of) or {"n": len(asked)})
    found = collect(seed, STAGE_1, STAGE_2, jobs)
    # The tower and two LLMs.
    assert (found["seed"], found["sizes"]["train"], found["runs"]) == (3, 320, 3 + len(STAGE_1) + len(STAGE_2))
    assert found["job minutes"] == round(len(jobs) / 10, 1)
    assert found["commits"] == ["0abc", "1abc"]
    assert found["measured"]["pictures"] == measure.PICTURES
    assert list(found["noise"]) == ["uniform 0.5", "biased 0.5", "swapped 0.5", "uniform 0.25", "uniform 0.75"]
    assert [(of, arm.noise, arm.name) for of, arm in asked[:3:2]] == [
        (seed, UNIFORM, "8 levels"),
        (seed, SWAPPED, "8 levels, swapped 0.5"),
    ]
    assert found["stage 1"].keys() == {arm.name for arm in STAGE_1}
    assert found["stage 1"]["8 levels, biased 0.5"]["noise"] == "biased 0.5"
    assert found["stage 1"]["4 levels"]["validation"].keys() == {"0", "1", "2", "3"}
    assert found["stage 1"]["4 levels"]["test"]["of"] == "4 levels"
    assert found["stage 1"]["one constant token"]["validation"].keys() == {"1"}  # 0 was never trained
    assert found["stage 2"]["no token"] == {"test": {"of": "no token"}}
    assert found["choosing"]["local"] == {"own row NLL": 0.5, "of": "local"}
    assert found["choosing"].keys() == {arm.name for arm in STAGE_2 if arm.mode in ("adaptive", "local")}
    assert found["samples"] == ["8 levels"]

    # Of a run that ended before: arms that were measured whole, and the runs that were made.
    ended = [job for job in jobs if job.result not in (seed.measures(STAGE_1[1]), seed.choosing(STAGE_2[1]))]
    found = collect(seed, STAGE_1, STAGE_2, ended)
    assert found["stage 1"].keys() == {arm.name for arm in STAGE_1} - {STAGE_1[1].name}
    assert found["stage 2"].keys() == {arm.name for arm in STAGE_2} - {STAGE_2[1].name}
    assert found["choosing"].keys() == {arm.name for arm in STAGE_2 if arm.mixes} - {STAGE_2[1].name}
    assert found["job minutes"] == round(len(ended) / 10, 1)
    assert collect(seed, STAGE_1, STAGE_2, jobs[:3]) is None


def test_arms_are_chosen_with_what_they_start_from():
    captions, answers = chosen_arms("local")
    assert [arm.name for arm in answers] == ["local"]
    assert captions == [CaptionArm("8 levels", "score", UNIFORM)]
    with pytest.raises(RunError, match="--only is 'vocal'; it needs to be in the name of an arm"):
        chosen_arms("vocal")


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_seed_goes_through_and_on_from_what_it_left(tmp_path):
    """Three kinds of arms, everything for real but small; a wider choice of arms then trains what is new alone."""

    def run(only: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiments", "--run-dir", str(tmp_path / "run"), "--sizes", "quick"]
        command += ["--seeds", "0", "--only", only, "--results", str(tmp_path / "results")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)

    done = run("swapped")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 18 jobs are left" in done.stdout
    measures = sorted((tmp_path / "run/seed-0/measures/stage-1").iterdir())
    assert [file.name for file in measures] == [
        f"{name}-swapped-0.5.json" for name in ("8-levels", "no-token", "top-quarter", "true-levels")
    ]
    with_levels, without, *_ = (json.loads(file.read_text()) for file in measures)
    assert with_levels["test"].keys() == set("01234567")
    assert without["test"].keys() == {"none"}

    again = run("swapped")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "$ torchrun" not in again.stdout
    assert "$ python" not in again.stdout

    wider = run("global")
    assert wider.returncode == 0, wider.stdout + wider.stderr
    assert wider.stdout.count("$ torchrun") == 2  # 8 levels, and stage 2 from it
    assert "demo.vision" not in wider.stdout
    assert (tmp_path / "run/seed-0/measures/stage-2/global.json").exists()
