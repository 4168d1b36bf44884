"""A profile's ranges are the stages, its rows add up, threads do not mix, and it never ends what it watches."""

import gzip
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from aligngpt import AlignGPTProcessor
from aligngpt.cli import main
from aligngpt.generate import Engine
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.profiling import Profile, Recorded, summary
from aligngpt.sampling import Sampling
from aligngpt.stages import ENGINE_STEP, OF_ANSWERING, TRAINING_STEP, Spent, Stopwatch, listening, stage

CPU = torch.device("cpu")
OF_FORWARD = ("vision tower", "projector", "gate", "injection", "LLM forward")
QUESTION = [{"role": "user", "content": "What?"}]


@pytest.fixture(scope="module")
def model(talker):
    return talker.eval()


@pytest.fixture(scope="module")
def processor(model, tokenizer) -> AlignGPTProcessor:
    return AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, processor) -> Path:
    """A folder with a model and a picture."""
    folder = tmp_path_factory.mktemp("profiling")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    Image.new("RGB", (60, 40), "red").save(folder / "red.png")
    return folder


def ranges(folder: Path, category: str = "user_annotation") -> list[dict[str, Any]]:
    """What the trace holds of a kind."""
    with gzip.open(folder / "trace.json.gz") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("cat") == category]


def rows(text: str) -> dict[str, float]:
    """Milliseconds of the summary's table, by name."""
    table = text.split("\n\n")[1].splitlines()[1:-1]
    return {line[:42].strip(): float(line[42:52]) for line in table}


def test_an_answer_of_the_command_is_profiled_and_the_same(place, tmp_path, capsys):
    words = ["chat", str(place / "model"), "--image", str(place / "red.png"), "--prompt", "What?", "--device", "cpu"]
    words += ["--max-new-tokens", "8", "--temperature", "1", "--seed", "3"]
    assert main(words) == 0
    answer = capsys.readouterr().out
    folder = tmp_path / "profile"
    assert main([*words, "--profile", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out == answer

    found = ranges(folder)
    names = [event["name"] for event in found]
    assert {*OF_ANSWERING, *OF_FORWARD, ENGINE_STEP} <= set(names)
    assert names.count(ENGINE_STEP) == 7  # the first one reads the prompt and takes a step, too
    assert (names.count("prefill"), names.count("decode step"), names.count("sampling")) == (1, 7, 8)
    assert len({event["tid"] for event in found if event["name"] in names}) == 1

    text = (folder / "summary.txt").read_text()
    assert text.strip() in said.err
    assert "ended before there were the 32" in text
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines[:-1])) <= 100
    table = rows(text)
    assert {*OF_ANSWERING, *OF_FORWARD, "in no stage"} < table.keys()
    whole = sum(event["dur"] for event in found if event["name"] == ENGINE_STEP) / 7e3
    assert table.pop(ENGINE_STEP) == pytest.approx(whole, rel=0.1)
    assert sum(float(line[42:52]) for line in text.split("\n\n")[1].splitlines()[2:-1]) == pytest.approx(whole, rel=0.1)


def test_a_conversation_is_profiled_after_an_answer_of_its_own(place, tmp_path, capsys, monkeypatch):
    typed = iter(["One?", "Two?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    words = ["chat", str(place / "model"), "--device", "cpu", "--max-new-tokens", "30", "--profile", str(tmp_path)]
    assert main(words) == 0
    assert "32 engine steps on a CPU" in capsys.readouterr().err
    names = [event["name"] for event in ranges(tmp_path)]
    assert (names.count(ENGINE_STEP), names.count("prefill")) == (32, 2)
    operators = {event["name"] for event in ranges(tmp_path, "cpu_op")}
    assert "aten::mm" in operators or "aten::addmm" in operators
    assert not any("convolution" in name for name in operators)  # the grey picture came before


def test_an_engine_in_its_own_thread_is_profiled_until_it_ends(model, processor, tmp_path):
    engine, said = Engine(model, processor, max_batch_size=2), list[str]()
    with Profile(tmp_path / "new", CPU, unit=ENGINE_STEP, skip=3, record=1000, say=said.append):
        engine.start()
        answers = [engine.ask(QUESTION, Sampling(6)), engine.ask(QUESTION, Sampling(9))]
        for answer in answers:
            with stage("data wait"):  # of another thread, while the engine is in its own stages
                answer.wait()
        engine.close()
    table = rows((tmp_path / "new/summary.txt").read_text())
    assert "data wait" not in table
    events = ranges(tmp_path / "new")
    (thread,) = {event["tid"] for event in events if event["name"] == ENGINE_STEP}
    assert thread != threading.main_thread().native_id
    assert sum(event["tid"] == thread for event in ranges(tmp_path / "new", "cpu_op")) > 100
    assert "3 before were not recorded" in said[0]
    assert "the 1000 that were to be recorded" in said[0]


def test_any_code_is_profiled_whole(model, processor, tmp_path):
    inputs = processor.apply_chat_template(QUESTION, tokenize=True)
    with Profile(tmp_path, "cpu", say=lambda text: None):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with Profile(tmp_path, "cpu", say=lambda text: None):  # over an earlier one
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    names = [event["name"] for event in ranges(tmp_path)]
    assert (names.count("profiled code"), names.count("LLM forward")) == (1, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["summary.txt", "trace.json.gz"]


def test_steps_are_counted_and_what_failed_is_not_written(tmp_path):
    said: list[str] = []

    def take(steps: int, folder: Path, **kwargs: Any) -> None:
        with Profile(folder, CPU, unit=TRAINING_STEP, say=said.append, **kwargs) as profile:
            for number in range(steps):
                with stage("loss"):
                    torch.ones(number + 1).sum().item()
                profile.step()
            if folder.name == "failed":
                raise RuntimeError("of the run")

    take(9, tmp_path / "some", skip=2, record=3)
    operators = [event["name"] for event in ranges(tmp_path / "some", "cpu_op")]
    assert operators.count("aten::ones") == 3
    assert "aten::item" in operators
    assert "waiting for them on a GPU: 1 a step: loss 1" in said[-1]
    take(2, tmp_path / "none", skip=2, record=3)
    assert said[-1].startswith("nothing was profiled: there were 2 training steps, and the first 2 are not recorded")
    with pytest.raises(RuntimeError, match="of the run"):
        take(4, tmp_path / "failed", skip=2, record=3)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "failed").exists()

    full = tmp_path / "full"
    with Profile(full, CPU, say=said.append):  # and it is a file by the time that it is written
        full.touch()
    assert said[-1].startswith(f"the profile could not be written into {full}: ")
    with Profile(tmp_path / "last", CPU, say=said.append):  # profilers that ended badly are in nobody's way
        torch.ones(1).sum()
    assert (tmp_path / "last/summary.txt").is_file()


def test_a_profiler_that_fails_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    said: list[str] = []

    def fail(self) -> None:
        raise RuntimeError("of the profiler")

    with monkeypatch.context() as broken:
        profile = Profile(tmp_path / "stop", CPU, unit=TRAINING_STEP, record=1, say=said.append)
        stop_trace = profile._profile.stop_trace
        broken.setattr(type(profile._profile), "stop_trace", fail)
        with profile:
            for _ in range(3):
                profile.step()
    assert said == [f"the profile could not be written into {tmp_path / 'stop'}: of the profiler"]
    stop_trace()
    assert not (tmp_path / "stop").exists()
    with Profile(tmp_path / "start", CPU, unit=TRAINING_STEP, skip=1, say=said.append) as profile:
        profile._profile.start_trace = lambda: fail(profile)
        for _ in range(3):
            profile.step()
    assert said[1:] == ["nothing is profiled: of the profiler"]


def test_a_context_that_ends_while_the_profile_is_written_waits_and_writes_no_other(tmp_path, monkeypatch):
    said: list[str] = []
    writing, goes_on = threading.Event(), threading.Event()
    write = Profile._write

    def slow(self) -> str:
        writing.set()
        assert goes_on.wait(60)
        return write(self)

    monkeypatch.setattr(Profile, "_write", slow)

    def engine() -> None:
        with stage(ENGINE_STEP):
            torch.ones(3).sum()

    with Profile(tmp_path, CPU, unit=ENGINE_STEP, record=1, say=said.append):
        thread = threading.Thread(target=engine)
        thread.start()
        assert writing.wait(60)
        threading.Timer(0.2, goes_on.set).start()
    assert (tmp_path / "summary.txt").is_file()  # the context has waited for the other thread
    thread.join()
    assert len(said) == 1
    assert "1 engine step on a CPU" in said[0]


@pytest.mark.parametrize("command", ["chat", "eval"])
def test_a_folder_of_others_is_refused_before_anything_is_read(command, tmp_path, capsys):
    words = [command, str(tmp_path / "no model")]
    words += ["--prompt", "What?"] if command == "chat" else ["--task", "pope", "--data", str(tmp_path), "--out", "out"]
    (tmp_path / "file").touch()
    for folder, message in (
        (tmp_path / "file", "file, a file; it needs a folder of its own"),
        (tmp_path, "which holds other files (file); it needs an empty or a new folder"),
        (tmp_path / "file/new", f"{tmp_path / 'file'} needs to be a folder that can be written to"),
    ):
        assert main([*words, "--profile", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"--profile is {folder}" in error
        assert message in error
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_answers_and_profile_are_not_written_into_one_folder(tmp_path, capsys):
    words = [
        "eval",
        str(tmp_path / "no model"),
        "--task",
        "pope",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "new"),
    ]
    assert main([*words, "--profile", str(tmp_path / "other/../new")]) == 2
    assert "which is --out too; it needs a folder of its own" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_stopwatch_keeps_threads_apart():
    watch = Stopwatch(CPU)
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with stage("checkpoint"):
            inside.set()
            done.wait(60)

    with listening(watch):
        thread = threading.Thread(target=other)
        with stage("optimizer"), stage("loss"):
            thread.start()
            inside.wait(60)
        done.set()  # it ends after the stages that it began in
        thread.join()
    paths = watch.by_path()
    assert set(paths) == {("optimizer",), ("optimizer", "loss"), ("checkpoint",)}
    assert {spent.calls for spent in paths.values()} == {1}
    own, with_inner = watch.seconds(), watch.seconds(own=False)
    assert with_inner["optimizer"] == pytest.approx(own["optimizer"] + own["loss"])


def test_a_stage_that_nobody_hears_is_nothing_and_compiles():
    heard: list[str] = []

    class Ear:
        def begin(self, name: str) -> None:
            heard.append(name)

        def end(self, name: str) -> None:
            heard.append(name)

    def step(x: torch.Tensor) -> torch.Tensor:
        with stage("LLM forward"):
            x = x * 2
            with stage("loss"):
                return x.sum()

    assert stage("loss") is stage("gate")  # the one object, made at import
    x = torch.arange(4.0)
    for listens_first in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        for listens in (listens_first, not listens_first):
            if listens:
                with listening(Ear()):
                    assert compiled(x) == 12
                    assert stage("loss") is not stage("loss")
            else:
                assert compiled(x) == 12
    assert heard == []


def gpu_trace() -> list[dict[str, Any]]:
    """Two steps of 100 us as a GPU's trace has them: "gate" launches kernels that run later, one by a CUDA graph."""

    def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}

    events = [event("user_annotation", ENGINE_STEP, 900, 50), event("cuda_runtime", "cudaStreamSynchronize", 990, 9)]
    for step in (1, 2):
        ts, number = step * 1000.0, step * 10
        events += [
            event("user_annotation", TRAINING_STEP, ts, 100),
            event("gpu_user_annotation", "gate", ts + 40, 200, tid=7),
            event("user_annotation", "gate", ts + 10, 30),
            event("cuda_runtime", "cudaLaunchKernel", ts + 12, 2, correlation=number),
            event("cuda_runtime", "cudaGraphLaunch", ts + 15, 2, correlation=number + 1),
            event("cuda_driver", "cuLaunchKernelEx", ts + 60, 2, tid=5, correlation=number + 2),
            event("cuda_runtime", "cudaStreamSynchronize", ts + 70, 20, correlation=number + 3),
            event("kernel", "void gate_kernel<float>(int)", ts + 45, 20, tid=7, correlation=number),
            event("kernel", "graph_kernel", ts + 55, 20, tid=8, correlation=number + 1),  # 10 beside the first
            event("kernel", "graph_kernel", ts + 75, 5, tid=8, correlation=number + 1),
            event("gpu_memcpy", "Memcpy DtoH", ts + 85, 5, tid=7, correlation=number + 2),
            event("kernel", "of nobody", ts + 90, 500, tid=7, correlation=number + 9),
        ]
    return events


def test_kernels_belong_to_the_stage_that_launched_them():
    recorded = Recorded(
        unit=TRAINING_STEP,
        count=2,
        skipped=0,
        wanted=2,
        paths={
            (TRAINING_STEP,): Spent(120e-6, 2),
            (TRAINING_STEP, "data wait"): Spent(20e-6, 2),
            (TRAINING_STEP, "gate"): Spent(60e-6, 4),
        },
        host_seconds=210e-6,
        events=gpu_trace(),
        device="a GPU",
        peak_bytes=2_000_000_000,
    )
    lines = summary(recorded).splitlines()
    table = {line[:42].strip(): line[42:].split() for line in lines if line[42:52].strip().replace(".", "").isdigit()}
    assert table[TRAINING_STEP] == ["0.100", "100.0", "%", "0.050"]
    assert table["gate"] == ["0.030", "30.0", "%", "2", "0.045"]
    assert table["in no stage"] == ["0.060", "60.0", "%", "0.005"]
    assert "these add up to 0.100 ms; by the host's clock a step took 0.105 ms" in lines
    assert "the host waits for the GPU 1, 0.020 ms a step: in no stage 1, 0.020 ms" in lines
    longest = [re.split(r"  +", line) for line in lines if "kernel" in line and re.search(r"\d\.\d{3}", line)]
    assert longest == [["graph_kernel", "0.025", "2", "gate"], ["gate_kernel<float>(int)", "0.020", "1", "gate"]]
    assert [line for line in lines if line.startswith("hint")] == [
        "hint: 10% of a step is spent waiting for data: more --data.workers, or DALI",
        "hint: the GPU idles 60% of a step: the host is the limit",
        "hint: 60% of a step lies in no stage: the trace shows what it is",
    ]
