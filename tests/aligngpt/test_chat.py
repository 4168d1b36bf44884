"""aligngpt.chat: what is streamed is what `generate` says, and no mistake ends a conversation."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import aligngpt.chat
from aligngpt import AlignGPTProcessor
from aligngpt.chat import Chat
from aligngpt.cli import main
from aligngpt.generate import Engine, Request
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.streaming import TextStream

WINDOW = 4096  # tokens of `talker`; answers as long as this take minutes
QUESTIONS = ("What is in the image?", "And now </s> why?")


@pytest.fixture(scope="module")
def model(talker):
    return talker


@pytest.fixture
def make_chat(model, tokenizer):
    def make(template: str = "v1", **options) -> Chat:
        processor = AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer, template)
        return Chat(Engine(model, processor, max_batch_size=1), **({"max_new_tokens": 30} | options))

    return make


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, tokenizer) -> Path:
    """Two model folders, "model" and "captioner", and a picture."""
    folder = tmp_path_factory.mktemp("chat")
    for name, template in (("model", "v1"), ("captioner", "plain")):
        model.save_pretrained(folder / name)
        processor = AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer, template)
        processor.save_pretrained(folder / name)
    Image.new("RGB", (64, 48), "red").save(folder / "my car.png")
    return folder


def generated(chat: Chat, inputs, **kwargs) -> str:
    """The whole answer by `generate` and `decode`."""
    tokens = chat.model.generate(**inputs, **({"do_sample": False, "max_new_tokens": 30} | kwargs))
    return chat.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def asked(picture, *words: str) -> list[dict]:
    """Messages whose first shows the picture."""
    first = [{"type": "image", "image": picture}, {"type": "text", "text": words[0]}]
    contents = [first, *words[1:]]
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_the_pieces_are_the_answer_and_history_enters_the_next_prompt(make_chat, place):
    chat = make_chat()
    picture = chat.show(place / "my car.png")
    messages = asked(picture, QUESTIONS[0])
    expected = generated(chat, chat.processor.apply_chat_template(messages, tokenize=True))
    pieces = list(chat.answer(QUESTIONS[0]))
    assert "".join(pieces) == expected
    assert len(pieces) > 3

    inputs = chat.processor.apply_chat_template(asked(picture, QUESTIONS[0], expected, QUESTIONS[1]), tokenize=True)
    seen = []
    embed = chat.model.model.embed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            chat.model.model, "embed", lambda ids, *rest, **more: seen.append(ids) or embed(ids, *rest, **more)
        )
        second = "".join(chat.answer(QUESTIONS[1]))
    assert torch.equal(seen[0], inputs["input_ids"])
    assert second == generated(chat, inputs)
    assert chat.pictures == []

    chat.reset()
    assert "".join(chat.answer("Hm?")) == generated(
        chat, chat.processor.apply_chat_template([{"role": "user", "content": "Hm?"}], tokenize=True)
    )


def test_a_fixed_level_is_generate_with_that_level(make_chat, place):
    answers = set()
    for level in (0, 3, 7):
        chat = make_chat()
        chat.fix_level(level)
        picture = chat.show(place / "my car.png")
        inputs = chat.processor.apply_chat_template(asked(picture, "What?"), tokenize=True)
        answer = "".join(chat.answer("What?"))
        assert answer == generated(chat, inputs, align_levels=torch.tensor([level]))
        answers.add(answer)
    assert len(answers) > 1
    chat.reset()
    assert "".join(chat.answer("No picture?"))  # a level without an alignment token is no mistake
    for level in (-1, 8):
        with pytest.raises(ValueError, match=f"level is {level}; this model has levels 0 to 7"):
            chat.fix_level(level)


def test_the_gate_is_the_models(make_chat, place):
    chat = make_chat()
    with pytest.raises(ValueError, match="no question was asked yet"):
        chat.gate_weights()
    list(chat.answer("Anyone?"))
    with pytest.raises(ValueError, match="had no picture"):
        chat.gate_weights()
    chat.reset()
    picture = chat.show(place / "my car.png")
    list(chat.answer("What?"))
    inputs = chat.processor.apply_chat_template(asked(picture, "What?"), tokenize=True)
    with torch.no_grad():
        expected = chat.model(**inputs).align_weights[0]
    assert torch.equal(chat.gate_weights(), expected)
    chat.fix_level(2)
    list(chat.answer("What?"))
    with pytest.raises(ValueError, match="level 2 was fixed"):
        chat.gate_weights()


@pytest.mark.parametrize("mode", ["none", "global", "average"])
def test_a_mode_without_a_gate_says_so(make_chat, monkeypatch, mode):
    chat = make_chat()
    monkeypatch.setattr(chat.model.config, "align_mode", mode)
    with pytest.raises(ValueError, match=f"align_mode '{mode}'"):
        chat.gate_weights()
    if mode == "none":
        with pytest.raises(ValueError, match="level is 1; this model has align_mode 'none'"):
            chat.fix_level(1)


def test_an_answer_that_is_stopped_stays_in_the_history(make_chat):
    chat = make_chat(max_new_tokens=500)
    answer = chat.answer("Go on?")
    said = next(answer) + next(answer)
    answer.close()
    assert [message["content"] for message in chat.history] == ["Go on?", said.strip()]
    assert not chat.engine.step()  # the model works no more

    said = []
    for piece in chat.answer("And on?"):  # stopped from elsewhere, it ends by itself
        said.append(piece)
        if len(said) == 3:
            chat.stop()
    assert 3 <= len(said) < 20
    assert [message["content"] for message in chat.history[2:]] == ["And on?", "".join(said).strip()]

    for _ in chat.answer("Forget it?"):
        chat.reset()
    assert chat.history == []


def test_the_last_question_is_answered_again_at_another_level(make_chat, place):
    chat = make_chat()
    with pytest.raises(ValueError, match="no question was asked yet"):
        next(chat.again())
    picture = chat.show(place / "my car.png")
    first = "".join(chat.answer(QUESTIONS[0]))
    chat.fix_level(3)
    second = "".join(chat.again())
    inputs = chat.processor.apply_chat_template(asked(picture, QUESTIONS[0]), tokenize=True)
    assert second == generated(chat, inputs, align_levels=torch.tensor([3])) != first
    assert [message["content"] for message in chat.history[1:]] == [second.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat.model.model, "embed", broken)
        with pytest.raises(RuntimeError, match="no kernel for this"):
            list(chat.again())
    assert [message["content"] for message in chat.history[1:]] == [second.strip()]
    answer = chat.answer("And now?")
    next(answer)
    for other in (chat.answer("What else?"), chat.again()):
        with pytest.raises(ValueError, match="a question of this conversation is being answered"):
            next(other)


def broken(*args, **kwargs):
    raise RuntimeError("no kernel for this")


def test_an_error_of_the_engine_reaches_the_caller(make_chat, place, monkeypatch):
    chat = make_chat()
    chat.show(place / "my car.png")
    monkeypatch.setattr(chat.model.model, "embed", broken)
    with pytest.raises(RuntimeError, match="no kernel for this"):
        list(chat.answer("What?"))
    assert chat.history == []
    assert len(chat.pictures) == 1


class Said:
    """An answer that says a text, as the engine's would."""

    finish_reason, align_weights = "length", None

    def __init__(self, text: str, processor: AlignGPTProcessor, request: Request):
        self.text, self.processor, self.request = text, processor, request

    def __iter__(self) -> Iterator[str]:
        stream = TextStream(self.processor, self.request.sampling.stop)
        for token in self.processor.tokenizer(self.text, add_special_tokens=False)["input_ids"]:
            if piece := stream.add(token):
                yield piece
            if stream.stopped:
                return
        yield stream.end()

    def cancel(self) -> None:
        pass


def saying(text: str, chat: Chat):
    """What the engine's `submit` would be if the model said `text`."""
    return lambda request: Said(text, chat.processor, request)


def test_fault_24_marks_in_words_never_stand_for_pictures(make_chat, place, monkeypatch):
    chat = make_chat()
    picture = chat.show(place / "my car.png")
    with pytest.raises(ValueError, match="the question holds <image>"):
        list(chat.answer("What is <image>?"))
    with monkeypatch.context() as patch:
        patch.setattr(chat.engine, "submit", saying("an <image> here", chat))
        assert "".join(chat.answer("What?")) == "an <image> here"
    inputs = chat.processor.apply_chat_template(asked(picture, "What?", "an image here", "Why?"), tokenize=True)
    assert "".join(chat.answer("Why?")) == generated(chat, inputs)
    assert (inputs["input_ids"] == 321).sum() == 16


def test_sampling_follows_its_seed(make_chat):
    answers = []
    for seed in (3, 3, 4):
        chat = make_chat(temperature=2.0, top_p=0.9, seed=seed)
        answers.append("".join(chat.answer("Well?")))
    assert answers[0] == answers[1] != answers[2]
    for name, value in (("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it needs"):
            make_chat(**{name: value})


def test_a_model_after_stage_1_captions(make_chat, place, monkeypatch):
    chat = make_chat("plain")
    with pytest.raises(ValueError, match="this model captions pictures; show it one"):
        list(chat.answer("What?"))
    assert chat.level == 7  # its gate has not been trained
    picture = chat.show(place / "my car.png")
    seen = []
    say = saying("a red car\nnext", chat)
    monkeypatch.setattr(chat.engine, "submit", lambda request: seen.append(request) or say(request))
    only = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    expected = chat.processor.apply_chat_template(only, tokenize=True)
    for level in (7, 0):
        chat.fix_level(level)
        assert "".join(chat.answer("words")) == "a red car"  # of the same picture
        assert torch.equal(seen[-1].inputs["input_ids"], expected["input_ids"])
        assert seen[-1].level == level
    chat.show(place / "my car.png")
    assert len(chat.pictures) == 1


def type_in(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_with_every_command(place, monkeypatch, capsys, make_chat):
    car = place / "my car.png"
    said = ["/help", f"/image '{car}'", "What?", "/gate", "/level 3", "What?", "/gate", "/level", "/reset", "", "Hm?"]
    type_in(monkeypatch, *said, "/quit", "never read")
    assert main(["chat", str(place / "model"), "--max-new-tokens", "20", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()

    chat = make_chat(max_new_tokens=20)
    chat.show(car)
    first = "".join(chat.answer("What?"))
    weights = chat.gate_weights().tolist()
    chat.fix_level(3)
    second = "".join(chat.answer("What?"))
    chat.fix_level(None)
    chat.reset()
    third = "".join(chat.answer("Hm?"))
    usage, rest = out.removeprefix("> ").split(f"> 64×48 pixels; the next question shows 1 picture\n> {first}\n> ")
    assert [line.split()[0] for line in usage.splitlines()] == list(aligngpt.chat.COMMANDS)
    bars, rest = rest.split("> level 3 is fixed\n")
    assert [float(line.split()[2]) for line in bars.splitlines()[:7]] == pytest.approx(weights, abs=5e-4)
    assert [line.count("#") for line in bars.splitlines()[:7]] == [round(weight * 40) for weight in weights]
    assert "level 7 is the global one" in bars
    assert rest == f"> {second}\n> > the gate mixes the levels\n> a new conversation\n> > {third}\n> "
    assert err.startswith("AlignGPT, float32 on cpu. /image PATH shows a picture, /help")
    assert err.endswith("level 3 was fixed for the last question; /level off goes back to the gate\n")


def test_mistakes_are_sentences_and_the_conversation_goes_on(place, monkeypatch, capsys, make_chat):
    mistakes = {
        "/image": "/image needs a path: /image PATH",
        "/image nothing.png": "nothing.png: no such file",
        "/image ~no-such-user/x.png": "~no-such-user/x.png: no such file",
        "/level 8": "level is 8; this model has levels 0 to 7",
        "/level x": "/level got 'x'; it needs a whole number, or off",
        "/gate": "no question was asked yet, so the gate has seen nothing",
        "/stop": "/stop is no command; there are /image, /level, /gate, /reset, /help, /quit",
        "<image>": "the question holds <image>, which stands for a picture; give its file as an image",
        "long "
        * WINDOW: f"tokens; the model reads 1 to {WINDOW}, its answer included: ask something shorter or start anew",
    }
    type_in(monkeypatch, *mistakes, "Hm?")
    assert main(["chat", str(place / "model"), "--max-new-tokens", "20", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    _, *sentences = err.splitlines()
    assert len(sentences) == len(mistakes)
    assert all(sentence.endswith(end) for sentence, end in zip(sentences, mistakes.values(), strict=True))
    answer = "".join(make_chat(max_new_tokens=20).answer("Hm?"))
    assert out == f"{'> ' * len(mistakes)}> {answer}\n> \n"


def test_bytes_that_are_no_text_end_no_conversation(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/\xff\n/help\n"), encoding="utf-8"))
    assert main(["chat", str(place / "model"), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "/\ufffd is no command" in err
    assert "/image PATH" in out


def test_ctrl_c_stops_the_answer_alone(make_chat, monkeypatch):
    """Ctrl-C while a piece is printed, then at the prompt, then Ctrl-D."""

    class Terminal(io.StringIO):
        pieces = 0

        def isatty(self):
            return True

        def write(self, text):
            self.pieces += text not in ("> ", "\n", "")
            if self.pieces == 3:
                self.pieces += 1
                raise KeyboardInterrupt
            return super().write(text)

    lines = iter(["Go on?", KeyboardInterrupt, "/reset", EOFError])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    chat = make_chat(max_new_tokens=500)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("builtins.input", typed)
    aligngpt.chat.converse(chat)
    assert not chat.engine.step()
    assert terminal.getvalue().endswith("\n\na new conversation\n\n")
    assert len(terminal.getvalue()) < 200  # of 500 tokens


def test_a_terminal_gets_no_control_characters(make_chat, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    chat = make_chat()
    monkeypatch.setattr(chat.engine, "submit", saying("a\x1b[2J\tb\nc", chat))
    for stdout, shown in ((Terminal(), "a[2J\tb\nc\n"), (io.StringIO(), "a\x1b[2J\tb\nc\n")):
        monkeypatch.setattr("sys.stdout", stdout)
        aligngpt.chat._print(chat.answer("Hm?"))
        assert stdout.getvalue() == shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image", "/nowhere.png"), "/nowhere.png: no such file"),
        (("--level", "8"), "level is 8; this model has levels 0 to 7"),
        (("--prompt", ""), "the question is empty"),
        (("--temperature", "-1"), "temperature is -1.0; it needs to be a float32 number of at least 0"),
        (("--device", "abacus"), "--device is 'abacus'; it needs to be auto, cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "--device is 'cuda:99'; torch sees"),
        (("--web",), "--web is given beside --prompt or --image; questions and pictures go into the page"),
        (("--max-length", "5000"), "max_length is 5000; it needs to be 2 to 4096, the model's window"),
    ],
)
def test_one_shot_refuses_with_one_sentence(place, capsys, options, message):
    assert main(["chat", str(place / "model"), "--prompt", "What?", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"aligngpt chat: {message}")
    assert err.count("\n") == 1


def test_an_llm_that_the_engine_cannot_run_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert main(["chat", str(tmp_path / "model"), "--prompt", "What?"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "its rope_type 'dynamic' turns every row by the length of the longest" in err


def test_a_folder_that_is_none_asks_no_hub(tmp_path, capsys):
    assert main(["chat", str(tmp_path / "nothing"), "--prompt", "What?"]) == 2
    assert "which is no folder" in capsys.readouterr().err


def test_a_public_folder_of_an_unknown_tower_gets_advice_for_the_command_line(tmp_path, capsys):
    public = json.loads((Path(__file__).parents[1] / "data/oracle/p16_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(public))
    assert main(["chat", str(tmp_path), "--prompt", "What?"]) == 2
    said = capsys.readouterr().err
    assert "config.json: mm_vision_tower is 'clip'; it needs to be openai/clip-vit-large-patch14-336 or" in said
    assert "or a local folder that holds the vision tower" in said
    assert "vision_config=" not in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_fault_52_code_in_a_folder_is_refused(place, tmp_path, monkeypatch, capsys, name):
    """transformers would ask on the terminal whether to run it, and take a question for the answer."""
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    config = json.loads((folder / name).read_text())
    auto_map = {"AutoConfig": "code.C", "AutoTokenizer": ["code.T", "code.T"], "AutoProcessor": "code.P"}
    (folder / name).write_text(json.dumps(config | {"auto_map": auto_map, "tokenizer_class": "T"}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\nC = P = T\n")
    type_in(monkeypatch, "y", "y")
    assert main(["chat", str(folder)]) == 2
    assert re.search(f"{name} has auto_map, which names code to run", capsys.readouterr().err)
    assert not (tmp_path / "ran").exists()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "aligngpt", "chat", *map(str, arguments), "--device", "cpu"]


def test_one_shot_prints_the_answer_alone(place, make_chat):
    chat = make_chat()
    chat.show(place / "my car.png")
    options = ("--image", place / "my car.png", "--prompt", "What?", "--max-new-tokens", "30")
    done = subprocess.run(command(place / "model", *options), capture_output=True, check=True)
    assert done.stdout.decode() == "".join(chat.answer("What?")) + "\n"
    assert done.stderr == b""


def test_ctrl_c_ends_one_shot(place):
    options = ("--prompt", "What?", "--max-new-tokens", WINDOW)
    with subprocess.Popen(
        command(place / "model", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == b""
