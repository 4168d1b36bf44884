"""The model `aligngpt` of lmms-eval 0.7: any of its tasks, answered by the generation engine.

    lmms-eval --model aligngpt --model_args pretrained=runs/stage-2/model --tasks mmbench_en_dev --batch_size 16

lmms-eval finds `manifest` among the entry points of the group `lmms_eval.models` and imports `AlignGPT` by the path in
it. Nothing else imports this file, since it needs lmms-eval.

All requests of a task go through `Engine.run`, so `--batch_size` is how many are answered at a time: a row whose answer
has ended goes to the next request, whatever its settings. Of several processes each answers its share.

What a task asks for is done, or refused by name: beams, `top_k` of a draw, any other setting that the engine lacks,
videos and sound, conversations of several rounds. There are two exceptions, which lmms-eval's own models make, too.
"\\n\\n" ends no answer: lmms-eval adds it to `until` of every task that names none, and it would cut paragraphs off.
`image_aspect_ratio` is not read: pictures are prepared as in training.

`loglikelihood` gives what lmms-eval's scorer takes, which is not what the name says: the mean negative log-likelihood
of the continuation's tokens and of what ends an answer. The scorer picks the smallest.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..batch import Batch, Example
from ..generate import Engine, Request
from ..loading import DTYPES, find_device, load_model
from ..processor import turns_of
from ..sampling import Sampling
from ..text import IMAGE_MARK, render

AUTO_ROWS = 16  # of --batch_size auto
MAX_NEW_TOKENS = 1024  # of a task that does not say, as with lmms-eval's LLaVA
_DTYPES = {"auto": None, "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"} | {name: name for name in DTYPES}
_READ = ("until", "max_new_tokens", "do_sample", "temperature", "top_p", "repetition_penalty", "num_beams", "top_k")
_NOT_READ = ("image_aspect_ratio",)
_NO_STOPS = ("", "\n\n")


def manifest() -> Any:
    """What lmms-eval is told of the model, a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # importing it loads all entry points, this one included

    return ModelManifest("aligngpt", simple_class_path=f"{__name__}.AlignGPT")


class AlignGPT(lmms):
    """A model folder as lmms-eval asks it.

    Args:
        pretrained: the folder.
        dtype: of the weights: fp32, bf16, fp16, or torch's names of them; "auto": as stored.
        max_length: tokens of a prompt and its answer together; None: the model's window, 4096 at most.
        level: the alignment level of all pictures; None: the gate mixes the levels.
        device: cpu, cuda, cuda:1, …; None: a GPU if any. Of several processes each takes its own.
        batch_size: answers at a time; "auto": `max_batch_size`, or 16 without it.

    Raises:
        ValueError: an argument that means nothing here, or the engine can't answer with this model.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        level: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it needs to be one of {', '.join(_DTYPES)}")
        if str(batch_size).startswith("auto"):
            batch_size = max_batch_size or AUTO_ROWS
        self.batch_size = _whole("batch_size", batch_size)
        self.level = None if level is None else _whole("level", level)
        self.device = find_device(device or "auto")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        model, processor = load_model(str(pretrained), _DTYPES[dtype])
        self.engine = Engine(
            model.to(self.device),
            processor,
            max_batch_size=self.batch_size,
            max_length=None if max_length is None else _whole("max_length", max_length),
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers, in the requests' order."""
        answers = self.engine.run(map(self._request, requests))
        return [
            GenerationResult(answer.text, TokenCounts(answer.num_prompt_tokens, len(answer.tokens)))
            for answer in self._watched(answers, len(requests))
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Each continuation's loss, and whether the model would greedily say just that. The smaller, the likelier.

        The pair is in a result's `text`: lmms-eval 0.7.3 makes a string of a pair that is not.
        """
        starts = range(0, len(requests), self.batch_size)
        batches = (map(self._example, requests[start : start + self.batch_size]) for start in starts)
        losses = (loss for batch in batches for loss in self._losses(self.engine.processor.collate(list(batch))))
        return list(self._watched(losses, len(requests)))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(
            f"task {requests[0].task_name} asks in several rounds, generate_until_multi_round; "
            "aligngpt needs generate_until, multiple_choice or loglikelihood"
        )

    def clean(self) -> None:
        """Free the model's memory, which lmms-eval may want for a judge of its own."""
        del self.engine
        super().clean()

    def _watched(self, results: Iterable[Any], total: int) -> Iterator[Any]:
        return iter(tqdm(results, "aligngpt", total, unit="answer", disable=self.rank != 0))

    def _asked(self, request: Instance) -> tuple[dict[str, Any], Any, str]:
        """The user's message, the task's document, and what errors call it."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        doc, name = self.task_dict[task][split][doc_id], f"task {task}, document {doc_id}"
        return {"role": "user", "content": _content(context, doc_to_visual(doc) or [], name)}, doc, name

    def _request(self, request: Instance) -> Request:
        message, _, _ = self._asked(request)
        inputs = self.engine.processor.apply_chat_template([message], tokenize=True)
        sampling = _sampling(request.args[1], f"task {request.task_name}")
        return Request(inputs, sampling, self.level if "pixel_values" in inputs else None)

    def _example(self, request: Instance) -> Example:
        message, doc, name = self._asked(request)
        said, processor = request.args[1], self.engine.processor
        said = said if isinstance(said, str) else said(doc)
        turns, pictures = turns_of([message, {"role": "assistant", "content": said.strip()}], name)
        parts = render(turns, processor.template, tokenizer=processor.tokenizer, has_images=bool(pictures), name=name)
        text = processor.tokenize(parts, num_images=len(pictures), max_length=None, name=name)
        if len(text.input_ids) > self.engine.max_length:
            raise ValueError(
                f"{name} has {len(text.input_ids)} tokens with its continuation; max_length is {self.engine.max_length}"
            )
        return Example(str(request.doc_id), text, processor.image_processor.pixels(pictures), self.level)

    @torch.no_grad()
    def _losses(self, batch: Batch) -> Iterator[GenerationResult]:
        inputs, model = batch.to(self.device).model_inputs(), self.engine.model
        labels, rows = inputs.pop("labels").flatten(), inputs.pop("rows")
        hidden = model.model(**inputs).last_hidden_state
        logits, labels = model.lm_head(hidden.flatten(0, 1)[rows]).float(), labels[rows + 1]
        losses, right = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels
        for number in range(len(batch.ids)):
            own = rows // batch.input_ids.shape[1] == number
            yield GenerationResult((float(losses[own].mean()), bool(right[own].all())))


def _whole(name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}; it needs to be a whole number") from error


def _content(context: str, visuals: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """A prompt's words and pictures, in order.

    Marks that are as many as the pictures are their places; otherwise pictures stand in front, and marks are left out.
    """
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(f"{name} shows a {type(visual).__name__}; aligngpt needs pictures, as PIL images")
    pictures = [{"type": "image", "image": visual} for visual in visuals]
    if not pictures:
        return [{"type": "text", "text": context}]
    first, *others = context.split(IMAGE_MARK)
    if len(others) != len(pictures):
        return [*pictures, {"type": "text", "text": first + "".join(others)}]
    content = [{"type": "text", "text": first}]
    for picture, words in zip(pictures, others, strict=True):
        content += [picture, {"type": "text", "text": words}]
    return content


def _sampling(settings: Mapping[str, Any], name: str) -> Sampling:
    """A task's generation_kwargs as the engine takes them."""
    given = {key: value for key, value in settings.items() if value is not None and key not in _NOT_READ}
    temperature = given.get("temperature", 1.0 if given.get("do_sample") else 0.0)
    draws = given.get("do_sample", True) and temperature != 0
    for key, value in given.items():
        if key not in _READ or (key == "num_beams" and value != 1) or (key == "top_k" and draws):
            raise ValueError(f"{name} sets {key}={value!r} in generation_kwargs; aligngpt needs a task without it")
    until = given.get("until", [])
    return Sampling(
        max_new_tokens=given.get("max_new_tokens", MAX_NEW_TOKENS),
        temperature=temperature if draws else 0.0,
        top_p=given.get("top_p", 1.0) if draws else 1.0,
        repetition_penalty=given.get("repetition_penalty", 1.0),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text not in _NO_STOPS),
        seed=int(torch.randint(2**63 - 1, ())) if draws else 0,  # from --seed; a request that is repeated gets another
    )
