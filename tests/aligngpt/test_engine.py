"""The generation engine: each request is answered as if it were alone, and as the model's `generate` answers it."""

import threading
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import accelerate
import pytest
import torch
from PIL import Image

from aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor, decoding
from aligngpt.generate import Engine, Request
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.sampling import Kind, Sampling

WINDOW = 256
QUESTIONS = (  # pictures, and text with a mark for each
    (("red",), "<image>\nWhat is this?"),
    ((), "No image at all in here, but a good many words."),
    (("navy", "olive"), "First <image> then <image> and which is brighter?"),
    (("olive",), "<image>"),
    ((), "Hm?"),
)
BACKBONES = {
    "llama": {},
    "gemma": {"num_key_value_heads": 1},  # scales its embeddings
    "phi": {"num_key_value_heads": 4},  # a head with a bias, a part of each head is rotated
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": WINDOW},  # learned positions
    "mistral": {"sliding_window": 12},  # shorter than the prompts
    "gemma3_text": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
}


def make_model(make_llm, make_tower, kind: str = "llama", **align) -> AlignGPTForConditionalGeneration:
    llm = make_llm(kind, max_position_embeddings=WINDOW, **BACKBONES[kind])
    model = AlignGPTForConditionalGeneration.from_parts(llm, make_tower("clip"), **align)
    model.generation_config.eos_token_id = None  # a random model must not stop at chance
    return model


@pytest.fixture(scope="module")
def model(make_llm, make_tower):
    return make_model(make_llm, make_tower)


@pytest.fixture(scope="module")
def processor(model, tokenizer):
    return AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)


@pytest.fixture
def engine(model, processor):
    return Engine(model, processor, max_batch_size=4)


def inputs_of(processor, number: int):
    colours, text = QUESTIONS[number % len(QUESTIONS)]
    return processor([Image.new("RGB", (60, 40), colour) for colour in colours] or None, text)


def generated(model, inputs, level=None, **kwargs) -> list[int]:
    """The answer by the model's `generate`."""
    if level is not None and "pixel_values" in inputs:
        inputs = {**inputs, "align_levels": torch.tensor([level])}
    kwargs = {"max_new_tokens": 6, "do_sample": False} | kwargs
    return model.generate(**inputs, **kwargs)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_answers_are_those_of_generate(make_llm, make_tower, tokenizer, kind, num_rows):
    """More requests than rows, of other lengths, with and without pictures and levels, asked for 0 to 9 tokens."""
    model = make_model(make_llm, make_tower, kind)
    processor = AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)
    cases = [(inputs_of(processor, i), (None, 7, None, 0)[i % 4], (9, 1, 5, 0, 7)[i % 5]) for i in range(11)]
    expected = [generated(model, inputs, level, max_new_tokens=n) if n else [] for inputs, level, n in cases]
    engine = Engine(model, processor, max_batch_size=num_rows)
    answers = list(engine.run(Request(inputs, Sampling(n), level) for inputs, level, n in cases))
    assert [answer.tokens for answer in answers] == expected
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert [answer.num_prompt_tokens for answer in answers] == [len(case[0]["input_ids"][0]) for case in cases]
    for answer in answers:
        assert answer.text == processor.decode(answer.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("mode", ["none", "local", "global", "average"])
def test_every_way_to_make_the_alignment_row(make_llm, make_tower, tokenizer, mode):
    model = make_model(make_llm, make_tower, align_mode=mode)
    processor = AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)
    inputs = [inputs_of(processor, number) for number in range(5)]
    answers = list(Engine(model, processor).run(Request(each, Sampling(6)) for each in inputs))
    assert [answer.tokens for answer in answers] == [generated(model, each) for each in inputs]
    with_gate = answers[0].align_weights is not None
    assert with_gate == (mode != "none")


def test_by_the_kernels(kernels, model, processor, engine):
    inputs = [inputs_of(processor, number) for number in (0, 1)]
    answers = list(engine.run(Request(each, Sampling(3)) for each in inputs))
    assert [answer.tokens for answer in answers] == [generated(model, each, max_new_tokens=3) for each in inputs]


def test_the_alignment_row_is_made_once_from_the_whole_prompt(model, processor, engine, monkeypatch):
    embedded = []
    embed = model.model.embed

    def count(ids, *args, **kwargs):
        embedded.append(ids.shape)
        return embed(ids, *args, **kwargs)

    monkeypatch.setattr(model.model, "embed", count)
    inputs = [inputs_of(processor, number) for number in range(4)]
    answers = [engine.submit(Request(each, Sampling(12))) for each in inputs]
    for answer in answers:
        answer.wait()
    assert embedded == [(1, sum(each["input_ids"].shape[1] for each in inputs))]  # one pack, once
    for answer, each in zip(answers, inputs, strict=True):
        if "pixel_values" in each:
            torch.testing.assert_close(answer.align_weights, model(**each).align_weights[0])
        else:
            assert answer.align_weights is None


def test_a_row_that_is_done_is_given_away_while_the_others_go_on(processor, engine):
    """One long answer and many short ones share four rows: it takes as many steps as the long one alone."""
    long = engine.submit(Request(inputs_of(processor, 1), Sampling(60)))
    short = [engine.submit(Request(inputs_of(processor, number), Sampling(5))) for number in range(20)]
    steps, ended = 0, []
    while engine.step():
        steps += 1
        ended += [answer for answer in short if answer.finish_reason and answer not in ended]
    assert long.finish_reason == "length"
    assert len(ended) == 20
    assert steps <= 60
    assert ended == short  # nobody overtakes


@pytest.mark.parametrize(("step_rows", "counts"), [(None, [1, 4]), ([5], [5]), ([2], [2, 5])])
def test_steps_have_the_rows_that_were_asked_for(model, processor, step_rows, counts):
    """Three answers of 4, 6 and 8 tokens: with one row left some are empty, and nobody is answered otherwise."""
    engine = Engine(model, processor, max_batch_size=5, step_rows=step_rows)
    step, seen = engine._run_step, set()
    engine._run_step = lambda num_rows, kind: seen.add(num_rows) or step(num_rows, kind)
    asked = [(inputs_of(processor, number), length) for number, length in ((1, 8), (0, 4), (2, 6))]
    answers = list(engine.run(Request(inputs, Sampling(length)) for inputs, length in asked))
    assert [answer.tokens for answer in answers] == [generated(model, each, max_new_tokens=n) for each, n in asked]
    assert sorted(seen) == counts
    with pytest.raises(ValueError, match=r"step_rows is \[6\]; it needs to be numbers from 1 to 5, max_batch_size"):
        Engine(model, processor, max_batch_size=5, step_rows=[6])


@pytest.mark.parametrize("lag", [0, 1])
def test_the_host_may_look_at_tokens_a_step_late(model, processor, engine, lag):
    """As on a GPU: what runs on after an end token, a stop string or a cancelled answer is seen by nobody."""
    engine._lag = lag
    plain = [generated(model, inputs_of(processor, number), max_new_tokens=20) for number in range(10)]
    ends = [tokens[(3 * number) % 11] for number, tokens in enumerate(plain)]
    engine.end_tokens = frozenset(ends)
    answers = list(engine.run(Request(inputs_of(processor, number), Sampling(20)) for number in range(10)))
    for answer, tokens in zip(answers, plain, strict=True):
        first = next((place for place, token in enumerate(tokens) if token in engine.end_tokens), None)
        assert answer.finish_reason == ("length" if first is None else "end")
        assert answer.tokens == tokens[: 20 if first is None else first + 1]


def test_an_answer_of_drawn_tokens_depends_on_its_request_alone(processor, engine):
    def sampling(number: int) -> Sampling:
        return Sampling(8, temperature=3.0, top_p=0.9, seed=number, repetition_penalty=(1.0, 1.3)[number % 2])

    requests = [Request(inputs_of(processor, number), sampling(number)) for number in range(10)]
    alone = [next(engine.run([request])).tokens for request in requests]
    assert [answer.tokens for answer in engine.run(requests)] == alone
    beside_greedy = [engine.submit(Request(inputs_of(processor, 4), Sampling(20))), engine.submit(requests[0])]
    assert beside_greedy[1].wait().tokens == alone[0]
    other = Request(requests[0].inputs, Sampling(8, temperature=3.0, top_p=0.9, seed=99))
    assert next(engine.run([other])).tokens != alone[0]


def test_the_repetition_penalty_is_transformers(model, processor, engine):
    for number in range(4):
        inputs = inputs_of(processor, number)
        answer = engine.submit(Request(inputs, Sampling(12, repetition_penalty=1.5))).wait()
        assert answer.tokens == generated(model, inputs, max_new_tokens=12, repetition_penalty=1.5)


def test_suppressed_and_end_tokens_come_from_the_generation_config(make_llm, make_tower, tokenizer):
    model = make_model(make_llm, make_tower)
    processor = AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)
    inputs = inputs_of(processor, 0)
    first = generated(model, inputs)
    model.generation_config.suppress_tokens = [first[0], first[2]]
    second = generated(model, inputs)
    assert second[0] != first[0]
    model.generation_config.eos_token_id = [second[3], 5]
    answer = Engine(model, processor).submit(Request(inputs, Sampling(6))).wait()
    assert answer.tokens == second[: second.index(second[3]) + 1]
    assert answer.finish_reason == "end"


def test_stop_strings_end_an_answer_and_its_row(model, processor, engine):
    inputs = inputs_of(processor, 1)
    whole = engine.submit(Request(inputs, Sampling(30))).wait()
    stop = whole.text[8:11]
    answer = engine.submit(Request(inputs, Sampling(30, stop=["never said", stop])))
    pieces = list(answer)
    assert "".join(pieces) == answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) < 30


def test_the_ends_of_the_cache(model, processor):
    inputs = inputs_of(processor, 1)
    length = inputs["input_ids"].shape[1]
    engine = Engine(model, processor, max_batch_size=2, max_length=length + 3)
    full = engine.submit(Request(inputs, Sampling(50)))
    assert full.wait().tokens == generated(model, inputs, max_new_tokens=3)
    assert full.finish_reason == "length"
    exact = Engine(model, processor, max_length=length)
    assert exact.submit(Request(inputs, Sampling(0))).wait().tokens == []
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens; the model reads 1 to {length}, its answer"):
        exact.submit(Request(inputs, Sampling(1)))
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens; the model reads 1 to {length - 1}"):
        Engine(model, processor, max_length=length - 1).submit(Request(inputs, Sampling(0)))


def test_what_is_wrong_with_a_request_is_said_when_it_is_made(model, processor, engine):
    good = inputs_of(processor, 0)
    ids = good["input_ids"]
    for change, level, message in (
        ({"input_ids": ids.expand(2, -1)}, None, r"input_ids has shape \(2, \d+\); a request is one prompt"),
        ({"input_ids": ids[:, :0], "gate_mask": None, "attention_mask": None, "pixel_values": None}, None, "has 0 tok"),
        ({"pixel_values": good["pixel_values"][:, :, :-1]}, None, r"pixel_values has shape .* \(images, 3, 56, 56\)"),
        ({"pixel_values": good["pixel_values"].repeat(2, 1, 1, 1)}, None, "16 image tokens; pixel_values holds 2"),
        ({"pixel_values": None}, None, "16 image tokens; pixel_values holds 0 images"),
        ({"gate_mask": good["gate_mask"][:, 1:]}, None, r"gate_mask has shape .*; input_ids has"),
        (
            {"input_ids": torch.full_like(ids, 500), "pixel_values": None},
            None,
            "token 500; the LLM's vocabulary is 0 to 319",
        ),
        ({"input_ids": torch.full_like(ids, -200), "pixel_values": None}, None, "token -200; the LLM's vocabulary"),
        ({}, 8, "level is 8; this model has levels 0 to 7"),
        ({}, -1, "level is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(Request({**good, **change}, level=level))
    for arguments, message in (
        ({"max_batch_size": 0}, "max_batch_size is 0; it needs to be at least 1"),
        ({"max_length": WINDOW + 1}, f"max_length is {WINDOW + 1}; it needs to be 2 to {WINDOW}, the model's window"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, processor, **arguments)
    assert not engine.step()  # nothing was left behind


def test_padding_of_a_prompt_is_left_out_and_a_missing_gate_mask_is_all_text(model, processor, engine):
    batch = processor(
        [Image.new("RGB", (60, 40), "red")], ["<image>\nWhat?", "And a longer one without any picture, " * 3]
    )
    padded = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "gate_mask")}
    padded["pixel_values"] = batch["pixel_values"]
    assert not padded["attention_mask"].all()
    alone = processor([Image.new("RGB", (60, 40), "red")], ["<image>\nWhat?"])
    assert next(engine.run([Request(padded, Sampling(6))])).tokens == generated(model, alone)
    bare = {name: alone[name] for name in ("input_ids", "pixel_values")}
    answer = next(engine.run([Request(bare, Sampling(6))]))
    assert answer.tokens == generated(model, bare)
    torch.testing.assert_close(answer.align_weights, model(**bare).align_weights[0])


def test_a_cancelled_answer_gives_its_row_back(processor, engine):
    running = [engine.submit(Request(inputs_of(processor, number), Sampling(50))) for number in range(4)]
    waiting = [engine.submit(Request(inputs_of(processor, number), Sampling(3))) for number in range(3)]
    pieces = iter(running[0])
    next(pieces)
    running[0].cancel()
    waiting[0].cancel()
    said = running[0].text
    assert said.endswith("".join(pieces)) or running[0].text.startswith(said)
    assert waiting[2].wait().finish_reason == "length"
    assert running[0].finish_reason == waiting[0].finish_reason == "cancelled"
    assert waiting[0].tokens == []
    assert len(running[0].tokens) < 10
    assert [answer.wait().finish_reason for answer in running[1:]] == ["length"] * 3


def test_an_error_hits_its_own_answers_alone(model, processor, engine, monkeypatch):
    good = engine.submit(Request(inputs_of(processor, 1), Sampling(20)))
    engine.step()
    embed = model.model.embed
    monkeypatch.setattr(model.model, "embed", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("no room")))
    bad = engine.submit(Request(inputs_of(processor, 0), Sampling(5)))
    with pytest.raises(MemoryError, match="no room"):
        bad.wait()
    assert bad.finish_reason == "error"
    monkeypatch.setattr(model.model, "embed", embed)
    later = engine.submit(Request(inputs_of(processor, 0), Sampling(5)))
    assert later.wait().tokens == generated(model, inputs_of(processor, 0), max_new_tokens=5)
    assert good.wait().tokens == generated(model, inputs_of(processor, 1), max_new_tokens=20)

    failing = engine.submit(Request(inputs_of(processor, 1), Sampling(9)))
    engine.step()
    step = engine._run_step
    engine._run_step = lambda *args: (_ for _ in ()).throw(RuntimeError("the device is lost"))
    with pytest.raises(RuntimeError, match="device is lost"):
        failing.wait()
    engine._run_step = step
    assert next(engine.run([later.request])).tokens == later.tokens


def test_what_fails_to_be_read_together_has_no_memory_when_each_is_read_by_itself(
    model, processor, engine, monkeypatch
):
    pack = []

    def fail_once(hidden):
        if not pack:
            pack.append(weakref.ref(hidden))
            raise MemoryError("no room")
        assert pack[0]() is None
        return torch.nn.Linear.forward(model.lm_head, hidden)

    monkeypatch.setattr(model.lm_head, "forward", fail_once)
    answers = [engine.submit(Request(inputs_of(processor, number), Sampling(3))) for number in range(2)]
    assert [answer.wait().finish_reason for answer in answers] == ["length"] * 2


def test_a_token_that_cannot_be_decoded_is_an_error_of_its_answer_alone(model, processor, engine, monkeypatch):
    answers = [engine.submit(Request(inputs_of(processor, number), Sampling(6))) for number in range(3)]
    monkeypatch.setattr(answers[1]._stream, "_decoded", lambda tokens: tokens[99])
    with pytest.raises(IndexError):
        answers[1].wait()
    assert answers[1].finish_reason == "error"
    for number in (0, 2):
        assert answers[number].wait().tokens == generated(model, inputs_of(processor, number))


def test_answers_that_nobody_wants_any_more_are_cancelled(processor, engine):
    answers = engine.run(Request(inputs_of(processor, number), Sampling(50)) for number in range(9))
    next(answers)
    answers.close()
    assert not engine.step()


def test_rows_without_an_answer_read_few_keys(processor, engine, monkeypatch):
    ends = []
    attend = decoding.flash_decode

    def look(q, k, v, lengths, **more):
        ends.append(lengths)
        return attend(q, k, v, lengths, **more)

    monkeypatch.setattr(decoding, "flash_decode", look)
    short = [engine.submit(Request(inputs_of(processor, 2), Sampling(2))) for _ in range(3)]
    long = engine.submit(Request(inputs_of(processor, 2), Sampling(8)))
    long.wait()
    assert all(answer.finish_reason == "length" for answer in short)
    assert ends[-1].shape == (4,)
    assert ends[-1][:3].tolist() == [6, 6, 6]  # the steps since
    assert ends[-1][3] == long.num_prompt_tokens + 7


def test_modes_of_who_runs_the_engine_change_nothing(model, processor):
    request = Request(inputs_of(processor, 0), Sampling(6))
    expected = generated(model, request.inputs)
    with torch.inference_mode():
        engine = Engine(model, processor)
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), nullcontext()):
        with mode:
            assert next(engine.run([request])).tokens == expected


def test_many_threads_ask_at_once(model, processor, engine):
    expected = [generated(model, inputs_of(processor, number), max_new_tokens=7) for number in range(5)]
    engine.start()
    with pytest.raises(ValueError, match="started already"):
        engine.start()
    wrong = []

    def ask(worker: int) -> None:
        for turn in range(4):
            number = (worker + turn) % 5
            answer = engine.submit(Request(inputs_of(processor, number), Sampling(7)))
            text = "".join(answer)
            if answer.tokens != expected[number] or text != answer.text:
                wrong.append((worker, turn))

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    last = engine.submit(Request(inputs_of(processor, 0), Sampling(100)))
    engine.close()
    engine.close()
    assert last.wait().finish_reason in ("cancelled", "length")
    assert next(engine.run([Request(inputs_of(processor, 0), Sampling(7))])).tokens == expected[0]  # without a thread


def test_a_thread_is_closed_only_once_it_has_started(engine, monkeypatch):
    """Another thread closes the engine while it starts."""
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    closer = threading.Thread(target=engine.close)
    start = threading.Thread.start

    def start_late(thread):
        if thread is not closer:
            start(closer)
            closer.join(0.1)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    engine.start()
    closer.join()
    engine.close()
    assert not failed
    assert not engine.is_serving


def test_conversations_are_asked_as_the_processor_takes_them(model, processor, engine):
    picture = Image.new("RGB", (60, 40), "navy")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    answer = engine.ask(messages, Sampling(6), level=3).wait()
    assert answer.tokens == generated(model, processor.apply_chat_template(messages, tokenize=True), level=3)


def test_steps_compile_whole_and_once_for_each_number_of_rows(kernels, model, processor, monkeypatch):
    """Not for each length, nor each request; the numbers are those of uncompiled steps, by the same op."""
    graphs = Counter()

    def backend(graph, example_inputs):
        ops = [node for node in graph.graph.nodes if "flash_decode" in str(node.target)]
        assert len(ops) == (model.config.text_config.num_hidden_layers if kernels == "triton" else 0)
        graphs["compiled"] += 1
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: compile(step, backend=backend, **kwargs))
    few = 1 if kernels == "triton" else 9  # the interpreter is slow
    engine = Engine(model, processor, max_batch_size=min(few, 4), compile=True)
    requests = [Request(inputs_of(processor, number), Sampling(2 + number)) for number in range(few)]
    answers = list(engine.run(requests))
    assert graphs["compiled"] <= 3  # 4, 2 and 1 rows
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == generated(model, request.inputs, max_new_tokens=request.sampling.max_new_tokens)
    drawn = Request(requests[0].inputs, Sampling(2, temperature=2.0, seed=3, repetition_penalty=1.2))
    assert next(engine.run([drawn])).tokens == next(Engine(model, processor).run([drawn])).tokens


def test_capturing_a_step_changes_nothing(model, processor, engine, monkeypatch):
    """As on a GPU: steps run to warm up, one is recorded but does not run, and a graph writes where it once did."""

    def state():
        layers = [tensor for layer in engine.cache.layers for tensor in (layer.keys, layer.values)]
        return [engine._token, engine._length, engine._sampler.num_chosen, engine._sampler.seen, *layers]

    class Graph:
        def pool(self):
            return 1

        def replay(self):
            self.out.copy_(step(*self.args))

    @contextmanager
    def record(graph, **options):
        before = [tensor.clone() for tensor in state()]
        yield
        graph.args, graph.out = last[-1]
        for tensor, value in zip(state(), before, strict=True):
            tensor.copy_(value)

    last, step, send = [], engine._run_step, engine._send
    engine._send = lambda tokens, *rest: send(tokens.clone(), *rest)  # to the host

    def run_step(*args):
        last.append((args, step(*args).clone()))
        return last[-1][1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in (("Stream", lambda device: stream), ("current_stream", lambda device: stream),
                       ("stream", nullcontext), ("CUDAGraph", Graph), ("graph", record)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    samplings = [Sampling(5 + i, (0.0, 2.0)[i % 2], 0.9, (1.0, 1.3)[i // 2 % 2], seed=i) for i in range(9)]
    requests = [Request(inputs_of(processor, i), sampling) for i, sampling in enumerate(samplings)]
    plain = [answer.tokens for answer in engine.run(requests)]
    engine._uses_graphs, engine._lag, engine._run_step = True, 1, run_step
    for number in range(4):  # each kind by itself
        assert next(engine.run(requests[number : number + 1])).tokens == plain[number]
    assert [answer.tokens for answer in engine.run(requests)] == plain
    assert {kind for rows, kind in engine._graphs if rows == 1} == {
        Kind(a, b) for a in (False, True) for b in (False, True)
    }
    assert len(last) == 3 * len(engine._graphs)


def test_a_model_whose_weights_lie_elsewhere(model, make_llm, make_tower, processor):
    inputs = inputs_of(processor, 0)
    offloaded = make_model(make_llm, make_tower)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.get_input_embeddings().weight.is_meta
    answer = Engine(offloaded, processor, max_batch_size=1).submit(Request(inputs, Sampling(6)))
    assert answer.wait().tokens == generated(model, inputs)


def test_what_would_not_be_answered_as_if_it_were_alone_is_refused(make_llm, make_tower, model, processor):
    from peft import PromptTuningConfig, get_peft_model

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    lengths = {"max_position_embeddings": WINDOW, "original_max_position_embeddings": 64}
    llm = make_llm("phi3", **lengths, rope_parameters=rope | factors)
    long = AlignGPTForConditionalGeneration.from_parts(llm, make_tower("clip"))
    assert Engine(long, processor).max_length == 64
    with pytest.raises(ValueError, match="max_length is 65; it needs to be 2 to 64"):
        Engine(long, processor, max_length=65)
    prompted = get_peft_model(make_model(make_llm, make_tower), PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=2, token_dim=64, num_attention_heads=4
    ))  # fmt: skip
    with pytest.raises(ValueError, match="an adapter of peft's that learns a prompt; the engine needs one of layers"):
        Engine(prompted.eval(), processor)


def test_an_llm_with_another_kind_of_memory_is_refused(make_tower):
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = AlignGPTForConditionalGeneration.from_parts(AutoModelForCausalLM.from_config(config), make_tower("clip"))
    with pytest.raises(ValueError, match="the engine can't answer with this LLM: it has layers of linear_attention"):
        Engine(model, None)


def test_an_llm_that_turns_a_row_by_the_length_of_others_is_refused(make_llm, make_tower):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = AlignGPTForConditionalGeneration.from_parts(make_llm(rope_parameters=rope), make_tower("clip"))
    with pytest.raises(ValueError, match="its rope_type 'dynamic' turns every row by the length of the longest"):
        Engine(model, None)


@pytest.mark.gpu
def test_graphs_on_a_gpu_never_wait_and_give_what_plain_steps_give(make_llm, make_tower, tokenizer):
    """In float32: in bfloat16 compiled code rounds in other places."""
    model = make_model(make_llm, make_tower).to("cuda")
    processor = AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)
    requests = [
        Request(inputs_of(processor, i), Sampling(10 + i, temperature=(0.0, 2.0)[i % 2], seed=i)) for i in range(9)
    ]
    plain = [answer.tokens for answer in Engine(model, processor, max_batch_size=4, compile=False).run(requests)]
    engine = Engine(model, processor, max_batch_size=4)
    assert [answer.tokens for answer in engine.run(requests)] == plain
    assert {rows for rows, _ in engine._graphs} >= {1, 4}
    torch.cuda._sleep(10**9)  # half a second in which the host runs ahead, and frees what it has sent
    assert [answer.tokens for answer in engine.run(requests)] == plain
    answers = [engine.submit(request) for request in requests[:4]]
    engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [answer.wait().tokens for answer in answers] == plain[:4]
