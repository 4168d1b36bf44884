"""`aligngpt eval`: answers are `generate`'s, asked for once whatever ends the run, and what is wrong is named."""

import copy
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import aligngpt.model
from aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligngpt.cli import main
from aligngpt.evaluation import answers, pope, runner
from aligngpt.evaluation.task import Question
from aligngpt.generate import Engine
from aligngpt.processor import AlignGPTImageProcessor

COUNT = 11  # questions, about three pictures
NEW = 12  # tokens of an answer
WORDS = ("Is there an", "Who are you and what do you do here,", "How many birds sit on an", "1 2 3 4 5 6", "So")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, talker, tokenizer) -> Path:
    """Of a model whose words depend on what it was asked, on the picture and on the level."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    model = copy.deepcopy(talker)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 30
        model.model.align_table *= 60
        for layer in model.model.decoder_layers:
            layer.self_attn.q_proj.weight *= 3
            layer.self_attn.o_proj.weight *= 6
            layer.mlp.down_proj.weight *= 10
    model.save_pretrained(folder)
    AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of `NEW` tokens; the model would go on for as long as it may."""
    question = pope.Question
    monkeypatch.setattr(pope, "Question", lambda *fields: question(*fields[:3], NEW, fields[4]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """POPE's files."""
    root = tmp_path / "eval"
    (root / "pope/coco").mkdir(parents=True)
    (root / "pope/val2014").mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"pope/val2014/{color}.png")
    rows = []
    labels: dict[str, list[dict]] = {"adversarial": [], "popular": [], "random": []}
    for number in range(COUNT):
        category, color = list(labels)[number * 3 // COUNT], ("red", "green", "blue")[number // 2 % 3]
        row = {"image": f"{color}.png", "text": f"{WORDS[number % 5]} old cat, {number}?"}
        rows.append({"question_id": number, **row, "category": category})
        labels[category].append({**row, "label": ("yes", "no")[number % 2]})
    for category, found in labels.items():
        (root / f"pope/coco/coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in found))
    (root / "pope/llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def words(model_folder: Path, data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A command line, by default for an --out of its own."""

    def words(*more: object, out: str = "out", model: Path = model_folder) -> list[str]:
        given = [model, "--task", "pope", "--data", data, "--out", tmp_path / out, "--device", "cpu", *more]
        return ["eval", *map(str, given)]

    return words


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The prompts' lengths of all that an engine was asked in this process."""
    submit, found = Engine.submit, []
    monkeypatch.setattr(
        Engine,
        "submit",
        lambda self, request: found.append(request.inputs["input_ids"].shape[1]) or submit(self, request),
    )
    return found


def forked(size: int, folder: Path, work: Callable[[int], int]) -> tuple[list[int], list[str]]:
    """The statuses of processes started as by torchrun, each with the status of `work(rank)`, and what they said."""
    folder.mkdir()

    def live(rank: int) -> int:
        said = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)
        if size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            dist.rendezvous = lambda *_, **__: iter([(dist.FileStore(str(folder / "store"), size), rank, size)])
        try:
            return work(rank)
        except SystemExit as stop:
            return int(stop.code or 0)

    # What tests before this one left is freed here: its threads, which are not in the children, may have to help.
    gc.collect()
    gc.freeze()
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            status = live(rank)
        finally:
            sys.stdout.flush()
            os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    gc.unfreeze()
    return statuses, [(folder / f"{rank}.txt").read_text() for rank in range(size)]


def killed_after(count: int) -> None:
    """This process is killed when it has written so many answers, in the middle of the next."""
    add, left = answers.AnswerFile.add, iter(range(count))

    def add_or_die(self: answers.AnswerFile, question: Question, answer: str) -> None:
        if next(left, None) is None:
            os.write(self.file, answers._line(question, answer)[:-5])
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, question, answer)

    answers.AnswerFile.add = add_or_die


def content(folder: Path) -> dict[str, bytes]:
    """Of the files that must not depend on how the answers came about."""
    return {name: (folder / "pope" / name).read_bytes() for name in ("answers.jsonl", "questions.json")}


def test_answers_are_generates_and_are_asked_for_once(words, asked, data, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # a bar is for terminals
    assert main(words("--batch-size", 4)) == 0
    said = capsys.readouterr()
    assert f"{COUNT}/{COUNT}" in said.err  # the bar
    assert "% right so far" in said.err
    assert "POPE" in said.out
    assert str(tmp_path / "out/report.md") in said.out

    model = AlignGPTForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = AlignGPTProcessor.from_pretrained(model_folder)
    given = [json.loads(line) for line in (tmp_path / "out/pope/answers.jsonl").read_text().splitlines()]
    questions = pope.questions(data)
    assert [record["key"] for record in given] == [question.key for question in questions]
    for question, record in zip(questions, given, strict=True):
        shown = [{"type": "image", "image": question.image}, {"type": "text", "text": question.prompt}]
        inputs = processor.apply_chat_template([{"role": "user", "content": shown}], tokenize=True)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        assert record == {
            "key": question.key,
            "prompt": question.prompt,
            "answer": processor.decode(tokens, skip_special_tokens=True).strip(),
        }
    assert len({record["answer"] for record in given}) > 3

    metrics = json.loads((tmp_path / "out/pope/metrics.json").read_text())
    assert metrics["questions"] == metrics["answered"] == len(asked) == COUNT
    assert metrics["partly"] is False
    right = [pope.credit(question, record["answer"]) for question, record in zip(questions, given, strict=True)]
    assert metrics["credit"]["mean"] == pytest.approx(100 * np.mean(right))
    assert metrics["credit"]["standard_error"] == pytest.approx(100 * np.std(right, ddof=1) / COUNT**0.5)
    report = (tmp_path / "out/report.md").read_text()
    assert f"{metrics['headline']:.1f}" in report
    assert main(words()) == 0  # another number of rows may go on
    assert len(asked) == COUNT
    assert json.loads((tmp_path / "out/pope/metrics.json").read_text()) == metrics


def test_killed_at_any_moment_it_goes_on(words, asked, tmp_path):
    assert main(words(out="straight")) == 0
    asked.clear()

    def die(count: int) -> Callable[[int], int]:
        def work(rank: int) -> int:
            killed_after(count)
            return main(words("--batch-size", 2))

        return work

    for sitting, count in enumerate((0, 3, 4)):
        statuses, said = forked(1, tmp_path / f"sitting {sitting}", die(count))
        assert statuses == [-signal.SIGKILL], said
    assert main(words("--batch-size", 3)) == 0
    assert len(asked) == COUNT - 7  # what was written before
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "out/pope").glob("answers*")) == ["answers.jsonl"]


def test_two_processes_share_and_another_number_goes_on(words, asked, tmp_path):
    assert main(words(out="straight")) == 0
    asked.clear()

    def one_dies(rank: int) -> int:
        if rank == 1:
            killed_after(2)
        return main(words())

    statuses, said = forked(2, tmp_path / "first", one_dies)
    assert statuses == [1, -signal.SIGKILL], said
    written = {path.name: path.read_bytes().count(b"\n") for path in (tmp_path / "out/pope").glob("answers*")}
    assert written == {"answers-0.jsonl": COUNT // 2, "answers-1.jsonl": 2}
    statuses, said = forked(3, tmp_path / "second", lambda rank: main(words()))
    assert statuses == [0, 0, 0], said
    assert said[0].count("report.md") == 1
    assert "report.md" not in said[1] + said[2]
    metrics = json.loads((tmp_path / "out/pope/metrics.json").read_text())
    assert metrics["answered"] == COUNT - COUNT // 2 - 2
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_every_condition_has_its_alignment_row(words, model_folder, tmp_path, monkeypatch):
    """A level is that row of the table for all, a mode is the config's, and none has no token."""
    rows: dict[str, list[torch.Tensor]] = {}
    run_task, inject = runner.run_task, aligngpt.model.inject

    def told(run, folder, work, *more):
        rows[folder.parent.name] = []
        return run_task(run, folder, work, *more)

    def seen(ids, table, image_rows, align_rows, *, plan, **options):
        rows[list(rows)[-1]].append(align_rows[: plan.align_place.shape[0]].clone())
        return inject(ids, table, image_rows, align_rows, plan=plan, **options)

    monkeypatch.setattr(runner, "run_task", told)
    monkeypatch.setattr(aligngpt.model, "inject", seen)
    monkeypatch.setattr(pope, "says_yes", lambda answer: answer.startswith("g"))  # so that answers differ in credit
    assert main(words("--ablate", "--limit", 5, "--batch-size", 3)) == 0
    table = AlignGPTForConditionalGeneration.from_pretrained(model_folder).model.align_table.detach()
    found = {name: torch.cat(parts) for name, parts in rows.items()}
    assert list(found) == ["adaptive", "local", "global", "average", *[f"level-{level}" for level in range(8)], "none"]
    for level in range(8):
        assert torch.equal(found[f"level-{level}"], table[level].expand(5, -1))
    assert torch.equal(found["global"], found["level-7"])
    torch.testing.assert_close(found["average"], (table[:7].mean(0) + table[7]).expand(5, -1))
    torch.testing.assert_close(found["local"] + table[7], found["adaptive"])
    assert found["local"].std(0).min() > 0  # a gate for each question
    assert found["none"].shape[0] == 0 or not found["none"].any()

    answers = {name: (tmp_path / "out" / name / "pope/answers.jsonl").read_text() for name in found}
    assert answers["global"] == answers["level-7"]
    assert len(set(answers.values())) > 2
    text = (tmp_path / "out/ablation.md").read_text()
    assert all(name in text for name in found)
    right = {
        name: np.array(
            [
                pope.credit(question, answer)
                for question, answer in zip(
                    (pope.questions(tmp_path / "eval")[place] for place in (0, 2, 4, 6, 8)),
                    (json.loads(line)["answer"] for line in text.splitlines()),
                    strict=True,
                )
            ]
        )
        for name, text in answers.items()
    }
    found = json.loads((tmp_path / "out/ablation.json").read_text())["tasks"][0]["gain"]
    for name, gain in found.items():
        more = 100 * (right[name] - right["adaptive"])
        assert gain["mean"] == pytest.approx(more.mean())
        assert gain["standard_error"] == pytest.approx(more.std(ddof=1) / 5**0.5)
    assert any(gain["standard_error"] for gain in found.values())
    assert (tmp_path / "out/ablation.png").stat().st_size > 5000


def test_a_part_of_the_questions_and_then_the_rest_profiled(words, asked, tmp_path, capsys):
    assert main(words("--limit", 4)) == 0
    found = [json.loads(line)["key"] for line in (tmp_path / "out/pope/answers.jsonl").read_text().splitlines()]
    assert found == ["0", "2", "5", "8"]
    assert json.loads((tmp_path / "out/pope/metrics.json").read_text())["partly"] is True
    assert main(words("--batch-size", 1, "--profile", tmp_path / "profile")) == 0
    assert len(asked) == COUNT
    assert json.loads((tmp_path / "out/pope/metrics.json").read_text())["partly"] is False
    assert "32 engine steps on a CPU" in capsys.readouterr().out
    assert "16 before were not recorded" in (tmp_path / "profile/summary.txt").read_text()


def test_a_damaged_picture_ends_it_by_name_and_loses_nothing(words, asked, data, tmp_path, capsys):
    picture = data / "pope/val2014/blue.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert main(words("--batch-size", 1)) == 2
    said = capsys.readouterr().err
    assert f"aligngpt eval: {picture}: can't be decoded" in said
    before = len((tmp_path / "out/pope/answers-0.jsonl").read_text().splitlines())
    assert before >= 1
    picture.write_bytes(whole)
    asked.clear()
    assert main(words("--batch-size", 1)) == 0
    assert len(asked) == COUNT - before


def test_what_is_wrong_is_said_before_anything_is_answered(words, asked, data, model_folder, tmp_path, capsys):
    def refused(*more: object, **options) -> str:
        assert main(words(*more, **options)) == 2
        return capsys.readouterr().err

    assert "--task holds 'popes'; it needs names among vqav2, vqav2-val, gqa," in refused("--task", "popes")
    assert "--batch-size is 0; it needs a whole number of at least 1" in refused("--batch-size", 0)
    assert "--ablate is given beside --level" in refused("--ablate", "--level", 3)
    assert "--level is 8; this model has levels 0 to 7" in refused("--level", 8)
    assert "--level is 1; this model has no alignment token" in refused("--level", 1, "--align-mode", "none")
    assert "--judge-url and --judge-model need each other" in refused("--judge-model", "judge")
    assert "gqa/data/testdev_balanced_questions.json is no file; --data needs LLaVA's eval.zip" in refused(
        "--task", "pope,gqa"
    )

    said = refused("--task", "pope,gqa,mme")
    assert "--task names 3 benchmarks; 2 of them need other --data:\n  gqa: " in said
    assert "\n  mme: " in said

    captioner = tmp_path / "captioner"
    shutil.copytree(model_folder, captioner)
    AlignGPTProcessor.from_pretrained(model_folder, template="plain").save_pretrained(captioner)
    assert "is a model after stage 1, which only captions" in refused(model=captioner)

    path = data / "pope/llava_pope_test.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"question_id": 4', '"question_id": 3'))
    assert "POPE has two questions called '3'" in refused()
    path.write_text(text.replace("cat, 7?", r"cat, 7?\n" + "old " * 4096))
    said = refused()
    assert "question 7 of POPE has" in said
    assert "the model reads 4096, its answer included" in said
    path.write_text(text)
    assert not (tmp_path / "out").exists()
    assert not asked

    assert main(words("--limit", 1)) == 0
    assert "align_mode is adaptive there, global here; it needs a folder of its own" in refused(
        "--align-mode", "global"
    )
    path.write_text(text.replace("cat, 7?", r"cat, 7?\nSay."))
    assert "holds answers to other questions than POPE has in the data now" in refused()
    assert len(asked) == 1
