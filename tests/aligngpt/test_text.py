"""aligngpt.text: the recorded cases, and masks that hold for tokenizers of every kind."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aligngpt.text import IGNORE_INDEX, Part, TokenIds, Turn, render, tokenize

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
CASES = json.loads((ORACLE / "tokenized.json").read_text())
IDS = TokenIds(image=100_001, align=100_000, pad=0)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 3 and Gemma: spells BOS, trims the words, has no system role.
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)


LLAMA_3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama(chat_template=None):
    """SentencePiece with byte fallback and BOS, `legacy: false`."""
    tokenizer = AutoTokenizer.from_pretrained(ORACLE)
    tokenizer.chat_template = chat_template
    return tokenizer


def byte_level(bos_token=None, *, adds_bos=False, chat_template=CHATML, rstrip=False):
    """Byte-level BPE: with "<|begin|>" cut as Llama 3 and Qwen2 cut, else as GPT-2 and SmolLM2 do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos_token == "<|begin|>":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3_CUT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    specials = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    words = ["user assistant USER ASSISTANT system image\n\n answer a red car what is in the picture"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, rstrip=rstrip) for token in specials])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, backend.token_to_id(bos_token))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos_token,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


# name: (tokenizer, ids that stand before <align>)
TOKENIZERS = {
    "llama": (llama(), [1]),
    "no_bos": (byte_level(), []),  # Qwen2
    "bos": (byte_level("<|begin|>", adds_bos=True), [0]),  # Llama 3
    "bos_is_header": (byte_level("<|im_start|>"), []),  # SmolLM2
    "template_bos": (byte_level("<|begin|>", chat_template=TRIMMING), [0]),  # BOS only from the chat template
    "both_bos": (byte_level("<|begin|>", adds_bos=True, chat_template=TRIMMING), [0]),
}

TURNS = [
    Turn("user", "What is in <image>\nthe picture?"),
    Turn("assistant", "a red car"),
    Turn("user", "USER: 日本 é?"),
    Turn("assistant", "No…\nassistant"),
]


def run(turns, template, tokenizer, *, generation=False, rows=3, align=True, **options):
    parts = render(turns, template, tokenizer=tokenizer, add_generation_prompt=generation, name="cat 7")
    return parts, tokenize(parts, tokenizer, IDS, rows_per_image=rows, align=align, name="cat 7", **options)


def combinations():
    """Every tokenizer in every template it can take; "plain" has one turn of each."""
    for kind, (tokenizer, front) in TOKENIZERS.items():
        for template in ("plain", "v1", "llama_2", "chat"):
            if template == "chat" and tokenizer.chat_template is None:
                continue
            before_align = [] if kind == "template_bos" and template != "chat" else front
            turns = TURNS[:2] if template == "plain" else TURNS
            yield pytest.param(tokenizer, template, turns, before_align, id=f"{kind}-{template}")


@pytest.mark.parametrize("case", CASES)
def test_recorded_case(case):
    recorded = CASES[case]
    turns = [Turn("user" if m["from"] == "human" else "assistant", m["value"]) for m in recorded["conversation"]]
    _, found = run(turns, case.split("/")[0], llama(), rows=1, align=False)
    assert [-200 if token == IDS.image else token for token in found.input_ids.tolist()] == recorded["input_ids"]
    assert found.labels.tolist() == recorded["labels"]
    assert found.num_supervised == recorded["supervised"]


@pytest.mark.parametrize(("tokenizer", "template", "turns", "front"), list(combinations()))
def test_layout_masks_and_generation_prompt(tokenizer, template, turns, front):
    """Layout, labels and gate mask against the parts' own text; a training sample begins with its prompt's ids."""
    parts, found = run(turns, template, tokenizer)
    ids, supervised = found.input_ids, found.labels != IGNORE_INDEX

    assert ids[: len(front) + 1].tolist() == [*front, IDS.align]
    assert (ids == IDS.align).sum() == 1
    block = (ids == IDS.image).nonzero().flatten()
    assert block.tolist() == list(range(int(block[0]), int(block[0]) + 3))
    if front:
        assert ids[1:].tolist().count(front[0]) == (1 if template == "llama_2" else 0)  # BOS opens each llama_2 round

    assert torch.equal(found.labels[supervised], ids[supervised])
    special = (ids == IDS.image) | (ids == IDS.align)
    text = ~special
    text[: len(front)] = False
    assert torch.equal(found.gate_mask, text & ~supervised)
    _, everything = run(turns, template, tokenizer, gate_text="all")
    assert torch.equal(everything.gate_mask, text)
    assert torch.equal(everything.input_ids, ids)

    answers = "".join(part.text for part in parts if part.kind == "answer")
    prompt = "".join(part.text for part in parts if part.kind == "text")
    if TOKENIZERS["llama"][0] is tokenizer:
        # Decoding SentencePiece drops and adds blanks at the seams; the recorded cases settle those.
        answers, prompt = answers.replace(" ", ""), prompt.replace(" ", "")
        decoded = [tokenizer.decode(ids[mask]).replace(" ", "") for mask in (supervised, text & ~supervised)]
    else:
        decoded = [tokenizer.decode(ids[mask]) for mask in (supervised, text & ~supervised)]
        if template == "chat" and front:
            prompt = prompt.removeprefix("<|begin|>")
    assert decoded == [answers, prompt]

    last = turns[:-1]
    _, prompted = run(last, template, tokenizer, generation=True)
    assert ids[: len(prompted.input_ids)].tolist() == prompted.input_ids.tolist()
    assert torch.equal(found.gate_mask[: len(prompted.input_ids)], prompted.gate_mask)
    assert supervised[len(prompted.input_ids)]  # what follows the prompt is the first thing learned


@pytest.mark.parametrize("kind", ["llama", "no_bos", "bos"])
def test_tokens_are_the_tokenizers_own(kind):
    """The private copy changes no id: each string between images tokenises as the tokenizer itself would."""
    tokenizer, _ = TOKENIZERS[kind]
    eos = tokenizer.eos_token
    for before, after in [
        ("USER:  a", "\nWhat?"),
        ("", " \n a red"),
        (f"x {eos}USER: é{eos}", f"{eos} 日本🙂"),
        (" ", ""),
    ]:
        parts = [Part(before, "text"), Part("<image>", "image"), Part(after, "answer")]
        ids = tokenize(parts, tokenizer, IDS, rows_per_image=1, align=False).input_ids.tolist()
        own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
        bos = [] if kind == "no_bos" else [tokenizer.bos_token_id]
        assert ids == [*bos, *own[0], IDS.image, *own[1]]


@pytest.mark.parametrize("kind", ["llama", "no_bos", "bos_is_header"])
@pytest.mark.parametrize("template", ["v1", "llama_2", "chat"])
def test_fault_24_special_tokens_in_words_stay_words(kind, template):
    """Control tokens come from the template alone, and the answer's mask stays where the answer is."""
    tokenizer, _ = TOKENIZERS[kind]
    if kind == "llama" and template == "chat":
        tokenizer = llama("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}")
    specials = tokenizer.all_special_tokens
    bad = "x" + "".join(specials) + " <align> <|im_start|>assistant\n"
    clean = [Turn("user", "x"), Turn("assistant", "yes")]
    dirty = [Turn("user", bad), Turn("assistant", "yes" + tokenizer.eos_token + "no")]
    _, expected = run(clean, template, tokenizer)
    parts, found = run(dirty, template, tokenizer)
    controls = torch.tensor(sorted(set(tokenizer.all_special_ids)))

    def control_tokens(ids):
        return ids[torch.isin(ids, controls)].tolist()

    assert control_tokens(found.input_ids) == control_tokens(expected.input_ids)
    learned = found.labels[found.labels != IGNORE_INDEX]
    answer = "".join(part.text for part in parts if part.kind == "answer")
    assert tokenizer.decode(learned).strip() == answer.strip()
    assert control_tokens(learned) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(("kind", "piece"), [("llama", "▁a"), ("no_bos", "Ġa")])
def test_token_across_header_and_answer_belongs_to_its_last_character(kind, piece):
    """A header that ends in a blank: the first word of the answer swallows it, and is learned."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    tokenizer = llama(template) if kind == "llama" else byte_level(chat_template=template)
    _, found = run([Turn("user", "x"), Turn("assistant", "a red")], "chat", tokenizer)
    supervised = found.labels != IGNORE_INDEX
    assert tokenizer.convert_ids_to_tokens(int(found.input_ids[supervised][0])) == piece
    assert tokenizer.decode(found.input_ids[supervised]).strip() == "a red" + tokenizer.eos_token
    assert not (found.gate_mask & supervised).any()


def test_swallowed_blanks_leave_masks_in_place():
    """A control token that strips blanks to its right (Phi 3) stays in the header, though an answer begins with one."""
    tokenizer = byte_level(
        rstrip=True,
        chat_template="{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>\n' }}{% endfor %}",
    )
    _, found = run([Turn("user", "a"), Turn("assistant", "  red ")], "chat", tokenizer)
    supervised = found.labels[found.labels != IGNORE_INDEX]
    assert tokenizer.decode(supervised) == "red <|im_end|>"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("user", "user"), ("user", "user")),  # the words look like headers
        (("assistant\n\n", " assistant "), ("assistant", "assistant")),  # and are trimmed
        (("a\n", "\n"), ("a", "")),
        (("", ""), ("", "")),
    ],
)
def test_chat_template_locates_words(words, kept):
    tokenizer, _ = TOKENIZERS["both_bos"]
    parts, found = run([Turn("user", words[0]), Turn("assistant", words[1])], "chat", tokenizer)
    assert "".join(part.text for part in parts) == (
        f"<|begin|><|im_start|>user\n\n{kept[0]}<|im_end|><|im_start|>assistant\n\n{kept[1]}<|im_end|>"
    )
    supervised = found.labels[found.labels != IGNORE_INDEX]
    assert tokenizer.decode(supervised) == kept[1] + "<|im_end|>"


def test_system_turn_replaces_the_default():
    turns = [Turn("system", "Be brief."), *TURNS]
    text = "".join(part.text for part in render(turns, "v1"))
    assert text == (
        "Be brief. USER: <image>\nWhat is in \nthe picture? ASSISTANT: a red car</s>"
        "USER: USER: 日本 é? ASSISTANT: No…\nassistant</s>"
    )
    text = "".join(part.text for part in render(turns, "llama_2"))
    assert text == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is in \nthe picture? [/INST] a red car </s>"
        "<s>[INST] USER: 日本 é? [/INST] No…\nassistant </s>"
    )


def test_several_images_in_a_turn_and_over_turns():
    turns = [
        Turn("user", "<image> or <image>?"),
        Turn("assistant", "yes"),
        Turn("user", "and\n<image>"),
        Turn("assistant", "no"),
    ]
    parts, found = run(turns, "v1", llama(), num_images=3)
    assert "".join(part.text for part in parts).split("questions. ")[1] == (
        "USER: <image>\n<image>\nor ? ASSISTANT: yes</s>USER: <image>\nand ASSISTANT: no</s>"
    )
    assert found.num_images == 3
    assert (found.input_ids == IDS.image).sum() == 9
    assert (found.input_ids == IDS.align).sum() == 1
    _, plain = run([Turn("user", "a<image>b<image>"), Turn("assistant", "a red")], "plain", llama())
    assert plain.input_ids[:8].tolist() == [1, IDS.align] + [IDS.image] * 6


def test_text_only_has_no_align():
    _, found = run(TURNS[2:], "v1", llama())
    assert found.num_images == 0
    assert not torch.isin(found.input_ids, torch.tensor([IDS.image, IDS.align])).any()
    assert found.gate_mask[:2].tolist() == [False, True]


def test_fault_26_fault_27_truncation():
    """Counted after expansion, at the end, never into the first image; the caller sees what is left to learn."""
    _, whole = run(TURNS, "v1", llama())
    image_end = int((whole.input_ids == IDS.image).nonzero().max()) + 1
    length = len(whole.input_ids)
    for kept in (length + 1, length, length - 1, image_end):
        _, cut = run(TURNS, "v1", llama(), max_length=kept)
        for name in ("input_ids", "labels", "gate_mask"):
            assert torch.equal(getattr(cut, name), getattr(whole, name)[:kept])
    assert cut.num_supervised == 0
    with pytest.raises(ValueError, match=f"cat 7: max_length {image_end - 1} .* end at token {image_end}"):
        run(TURNS, "v1", llama(), max_length=image_end - 1)


def test_fault_27_a_cut_never_falls_inside_an_image():
    """Wherever it is: in front of an image that it would cut, whose place and all that follows are left out."""
    turns = [Turn("user", "<image>a"), Turn("assistant", "b"), Turn("user", "<image><image>c"), Turn("assistant", "d")]
    _, whole = run(turns, "v1", llama(), num_images=3)
    is_image = whole.input_ids == IDS.image
    rows = is_image.nonzero().squeeze(1).tolist()
    blocks = [range(rows[at], rows[at] + 3) for at in (0, 3, 6)]
    for max_length in range(blocks[0].stop, len(whole.input_ids) + 2):
        _, cut = run(turns, "v1", llama(), num_images=3, max_length=max_length)
        kept = next((block.start for block in blocks if block.start < max_length < block.stop), max_length)
        for name in ("input_ids", "labels", "gate_mask"):
            assert torch.equal(getattr(cut, name), getattr(whole, name)[:kept])
        assert (cut.input_ids == IDS.image).sum() == 3 * cut.num_images
        assert cut.num_images == sum(block.stop <= kept for block in blocks)
    for max_length in range(1, blocks[0].stop):
        with pytest.raises(ValueError, match=f"max_length {max_length} cuts the first image; its rows end at token"):
            run(turns, "v1", llama(), num_images=3, max_length=max_length)


USER, ANSWER = Turn("user", "a"), Turn("assistant", "b")


@pytest.mark.parametrize(
    ("turns", "template", "options", "message"),
    [
        ([], "v1", {}, "cat 7: the roles are"),  # fault 25
        ([USER, USER], "v1", {}, "cat 7: the roles are"),
        ([ANSWER, USER], "chat", {}, "cat 7: the roles are"),
        ([Turn("system", "a")], "v1", {}, "cat 7: the roles are"),
        ([USER, ANSWER, USER, ANSWER], "plain", {}, "plain' takes one user and one assistant"),
        ([USER, ANSWER], "v1", {"generation": True}, "generation prompt needs the user's"),
        ([Turn("user", "<image>"), ANSWER], "v1", {"num_images": 2}, "cat 7: .* 1 <image> marks; .* 2 images"),  # 23
        ([Turn("user", "a\ud800"), ANSWER], "v1", {}, "cat 7: the text is not valid Unicode"),
        ([Turn("user", "a\ufdd0"), ANSWER], "v1", {}, r"cat 7: turn 0 holds U\+FDD0"),
        ([USER, ANSWER], "vicuna", {}, "must be one of plain, v1, llama_2, chat"),
        ([USER, ANSWER], "v1", {"gate_text": "none"}, "must be one of prompt, all"),
    ],
)
def test_refused_conversation(turns, template, options, message):
    with pytest.raises(ValueError, match=message):
        run(turns, template, TOKENIZERS["no_bos"][0], **options)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "this tokenizer has none"),
        (TRIMMING, "cat 7: .* refuses the roles system, user, assistant: no system role"),
        (CHATML.replace("messages %}{{", "messages[1:] %}{{"), "writes turns 1, 2 of 3"),  # drops the system turn
        (CHATML.replace("m.content", "m.content | upper"), "cat 7: .* rewrites the words of turn 0"),
        (CHATML.replace("<|im_end|>", "###").replace("'<|im_start|>' +", ""), "it needs a special token"),
    ],
)
def test_refused_chat_template(chat_template, message):
    with pytest.raises(ValueError, match=message):
        run([Turn("system", "s"), USER, ANSWER], "chat", byte_level(chat_template=chat_template))


def test_reserved_ids_and_slow_tokenizers_are_refused():
    tokenizer = TOKENIZERS["no_bos"][0]
    taken = tokenizer("car", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(ValueError, match=f"toy: token {taken} stands in the text"):
        tokenize([Part("car", "text")], tokenizer, TokenIds(taken, 9999, 0), rows_per_image=1, align=True, name="toy")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow without character offsets"):
        tokenize([Part("car", "text")], Slow(), IDS, rows_per_image=1, align=True)  # type: ignore[arg-type]


def test_tokens_added_later_are_seen():
    """The private copy follows the tokenizer when a special token joins it."""
    tokenizer = byte_level()
    _, before = run([Turn("user", "a<|new|>b"), ANSWER], "chat", tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    _, after = run([Turn("user", "a<|new|>b"), ANSWER], "chat", tokenizer)
    assert torch.equal(before.input_ids, after.input_ids)
    new = tokenizer.convert_tokens_to_ids("<|new|>")
    written = tokenize([Part("a<|new|>b", "text")], tokenizer, IDS, rows_per_image=1, align=True)
    assert new in written.input_ids


@pytest.mark.parametrize("template", ["v1", "llama_2", "plain"])
def test_fault_24_without_pictures_a_mark_is_a_word(template):
    tokenizer = llama()
    turns = [Turn("user", "Why <image> so?"), Turn("assistant", "As <image> is a tag.")]
    parts = render(turns, template, tokenizer=tokenizer, has_images=False)
    assert all(part.kind != "image" for part in parts)
    tokens = tokenize(parts, tokenizer, IDS, rows_per_image=4, align=True, num_images=0)
    assert not torch.isin(tokens.input_ids, torch.tensor([IDS.image, IDS.align])).any()
    assert "<image>" in tokenizer.decode(tokens.labels[tokens.labels >= 0])


@pytest.mark.parametrize("template", ["v1", "llama_2", "plain"])
def test_fault_24_beside_a_picture_an_answers_mark_is_a_word(template):
    turns = [Turn("user", "<image>\nWhat is written?"), Turn("assistant", "It says <image> and <align></s>.")]
    parts, tokens = run(turns, template, llama(), num_images=1)
    assert [part.kind for part in parts].count("image") == 1
    assert (tokens.input_ids == IDS.image).sum() == 3
    assert (tokens.input_ids == IDS.align).sum() == 1
    said = tokens.labels[tokens.labels >= 0]
    assert "It says <image> and <align></s>." in llama().decode(said)
    assert (said == 2).sum() == (template != "plain")  # the template's own </s>, not the one in the words


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKC()])
def test_characters_that_a_normaliser_merges_stay_in_their_part(normalizer):
    """Decomposed text, as macOS and some Vietnamese and Korean data have it, under Qwen2's kind of tokenizer."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizer
    turns = [Turn("user", "Cafe\u0301 u\u0308ber?"), Turn("assistant", "Mu\u0308de e\u0301")]
    for template in ("v1", "llama_2", "plain", "chat"):
        tokens = tokenize(
            render(turns, template, tokenizer=tokenizer, has_images=False),
            tokenizer,
            IDS,
            rows_per_image=1,
            align=True,
        )
        answer = tokenizer.decode(tokens.labels[tokens.labels >= 0])
        assert answer.startswith(("Müde é", " Müde é")), (template, answer)
        assert "Café" not in answer
