"""What a run needs, counted before it starts and without allocating it; `training.dry_run` prints it.

`python -m training.plan --gpus 64 --model 7b --samples 558k` is training/forecast.py: the same without model folder
and data, with the hours and the communication of a cluster.

    weights ─ what each process holds of them, to the byte: parameters, gradients, optimizer
    activations ─ the model's own forward and backward on the meta device, with its storages' sizes added up
    data ─ records tokenised by sample, the first steps packed, tokens and FLOPs of a step, hours

Parameters, gradients and optimizer follow from the shapes and from how FSDP2 cuts (`torch.chunk` along dimension 0, all
parts padded to the first one's size). What comes and goes within a step is an estimate: a model of three moments, the
tower's, the loss's and the start of the backward pass, of which the heaviest counts; memory that CUDA, NCCL and the
allocator's gaps take is not in it.
"""

import copy
import dataclasses
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from aligngpt_kernels.cross_entropy import chunk_rows, sums_apart
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from aligngpt.config import AlignGPTConfig
from aligngpt.model import AlignGPTForConditionalGeneration
from training import lora, run_folder, sharding
from training.config import ShardingConfig, TrainConfig
from training.flops import Flops, count_flops
from training.loader import Order, Samples
from training.packing import pack, share

SAMPLED_RECORDS = 512
SIMULATED_STEPS = 32
TIED = "embedding, also the head"
GROUPS = ("vision tower", "projector", "gate", "table", "embedding", TIED, "LLM layers", "LoRA adapters", "head")


# ---------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weight:
    """A parameter. unit: what it is gathered with, "layer 0" and so on or "root"; "tower" is never cut."""

    shape: tuple[int, ...]
    trained: bool
    group: str
    unit: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def part(self, shards: int, place: int = 0) -> int:
        """Elements of the process at this place among those that share the weight; 0 has the most."""
        if self.unit == "tower":
            return self.elements
        rows = -(-self.shape[0] // shards)
        return max(0, min(rows, self.shape[0] - place * rows)) * (self.elements // self.shape[0])


def weights_of(model: AlignGPTForConditionalGeneration) -> list[Weight]:
    """Every parameter once, whether it is real, sharded or on meta."""
    layers = {
        parameter: f"layer {number}"
        for number, layer in enumerate(model.model.decoder_layers)
        for parameter in layer.parameters()
    }
    tower = set(model.model.vision_tower.parameters())
    embedding = set(model.get_input_embeddings().parameters())
    groups = {
        "vision tower": tower,
        "projector": set(model.model.multi_modal_projector.parameters()),
        "gate": set(model.model.align_gate.parameters()),
        "table": {model.model.align_table},
        "LoRA adapters": {p for name, p in model.named_parameters() if {"lora_A", "lora_B"} & set(name.split("."))},
        "embedding": embedding,
        "head": set(model.lm_head.parameters()),
    }
    if model.lm_head.weight in embedding:
        groups[TIED] = groups.pop("embedding")
    return [
        Weight(
            tuple(parameter.shape),
            parameter.requires_grad,
            next((group for group, members in groups.items() if parameter in members), "LLM layers"),
            "tower" if parameter in tower else layers.get(parameter, "root"),
        )
        for parameter in model.parameters()
    ]


def parameter_bytes(weights: Iterable[Weight], shards: int, *, compute_bytes: int) -> int:
    """Bytes of a process's parameters: trained ones are fp32, frozen ones of the arithmetic's type."""
    return sum(weight.part(shards) * (4 if weight.trained else compute_bytes) for weight in weights)


def gradient_bytes(weights: Iterable[Weight], shards: int) -> int:
    """Bytes of a process's gradients, fp32, once they are reduced."""
    return sum(weight.part(shards) * 4 for weight in weights if weight.trained)


def optimizer_bytes(weights: Iterable[Weight], shards: int, place: int = 0) -> int:
    """Bytes of AdamW's state: two fp32 moments, which are not padded, and a step for each trained weight."""
    return sum(weight.part(shards, place) * 8 + 4 for weight in weights if weight.trained)


# ---------------------------------------------------------------------------------------------------- activations


class Live(TorchDispatchMode):
    """Adds up the bytes of the storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes() if size is None else size
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def _flash_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
    """Keeps what all fused attention keeps, whichever the run will have: its arguments, its result, a sum a row."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # only for the shapes: torch's operator takes as many heads everywhere, those of the run do not
        key, value = (tensor[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for tensor in (key, value))
    result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register("aligngpt_plan", _flash_attention)


@dataclass(frozen=True)
class MicroBatch:
    """The largest one of a process."""

    shape: tuple[int, int]  # of its token ids
    images: int
    supervised_tokens: int

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Activations:
    """Bytes that live at three moments of a micro-batch."""

    tower: int
    loss: int
    backward: int


def activations(model: AlignGPTForConditionalGeneration, batch: MicroBatch, dtype: torch.dtype) -> Activations:
    """Of a model on meta with its layers wrapped as the run wraps them; it is left with one layer, in this dtype.

    Tower and LLM are run; projector and loss, whose kernels do not run on meta, are counted. Decoder layers hold alike,
    so two tell of all.
    """
    model.to(dtype)
    for part in (model.model.vision_tower, model.model.language_model):
        part.config._attn_implementation = "aligngpt_plan"
    config, width, bytes_each = model.config, model.config.text_config.hidden_size, dtype.itemsize
    size = config.vision_config.image_size
    with _ignoring(model) as tower:
        features = model.model.image_features(torch.empty(batch.images, 3, size, size, device="meta"))

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # gradients of weights are counted elsewhere
    layers = model.model.decoder_layers
    others = max(0, len(layers) - 2)
    del layers[2:]
    kept, peak = _llm_bytes(model, batch, dtype)
    if others:
        del layers[1:]
        of_layer = kept - _llm_bytes(model, batch, dtype)[0]
        kept, peak = kept + others * of_layer, peak + others * of_layer

    # The projector keeps its input and what comes before the GELU; image rows are kept by the gate.
    kept_by_projector = features.nbytes + 2 * batch.images * config.image_seq_length * width * bytes_each
    return Activations(
        tower=tower.peak,
        loss=kept + kept_by_projector + _loss_bytes(model, batch, bytes_each),
        backward=peak + kept_by_projector,
    )


def _llm_bytes(model: AlignGPTForConditionalGeneration, batch: MicroBatch, dtype: torch.dtype) -> tuple[int, int]:
    """What the LLM without its head keeps for its backward pass, and the most that lives by that pass's end."""
    embedded = torch.empty(
        *batch.shape, model.config.text_config.hidden_size, device="meta", dtype=dtype, requires_grad=True
    )
    positions = torch.arange(batch.shape[1], device="meta").expand(batch.shape)
    with _ignoring(model) as live:
        live.add(embedded)
        outputs = model.model.language_model(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        hidden = outputs.last_hidden_state
        kept = live.now
        hidden.backward(torch.empty_like(hidden))
    return kept, live.peak


def _loss_bytes(model: AlignGPTForConditionalGeneration, batch: MicroBatch, bytes_each: int) -> int:
    """What `linear_cross_entropy` holds beside its arguments: logits of a chunk, gradients of rows and weight."""
    head, rows = model.lm_head, batch.supervised_tokens
    vocabulary, width = head.weight.shape
    if head.bias is not None:  # the module and torch's loss
        return rows * (width * bytes_each + vocabulary * (2 * bytes_each + 8))
    logits = min(rows, chunk_rows(rows, vocabulary, width, bytes_each)) * -(-vocabulary // 16) * 16 * bytes_each
    of_rows = (2 * rows + batch.tokens) * width * bytes_each
    if not head.weight.requires_grad:
        return logits + of_rows
    apart = sums_apart(rows, vocabulary, width, model.dtype)
    return logits + of_rows + vocabulary * width * ((4 if apart else bytes_each) + bytes_each)


def _ignoring(model: nn.Module) -> Live:
    live = Live()
    for tensor in (*model.parameters(), *model.buffers()):
        live.add(tensor, 0)
    return live


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: on its device at the heaviest moment of a step, and on the host (`--sharding.offload`)."""

    tower: int
    parameters: int  # all but the tower's
    gradients: int
    optimizer: int
    moment: str
    gradients_then: int  # at that moment; the rest likewise
    gathered: int
    reducing: int
    activations: int
    pixels: int
    offload: bool

    @property
    def host(self) -> int:
        return self.parameters + self.gradients + self.optimizer if self.offload else 0

    @property
    def device(self) -> int:
        comes_and_goes = self.gathered + self.reducing + self.activations + self.pixels
        stays = 0 if self.offload else self.parameters + self.gradients_then + self.optimizer
        return self.tower + stays + comes_and_goes


def memory(
    weights: list[Weight],
    held: Activations,
    *,
    shards: int,
    compute_bytes: int,
    micro_batches: int,
    pixels: int,
    config: ShardingConfig,
) -> Memory:
    """What a process holds at the heaviest of four moments of a step of so many micro-batches."""
    cut = [weight for weight in weights if weight.unit != "tower"]
    units: dict[str, list[Weight]] = {}
    for weight in cut:
        units.setdefault(weight.unit, []).append(weight)
    root, layers = units.pop("root"), list(units.values())

    def gathered(members: Iterable[Weight]) -> int:
        return sum(weight.part(shards) * shards for weight in members) * compute_bytes

    def reduced(members: Iterable[Weight]) -> int:
        """Whole gradients in the arithmetic's type, and the padded fp32 copy that is summed over the processes."""
        trained = [weight for weight in members if weight.trained]
        return sum(weight.elements * compute_bytes + weight.part(shards) * shards * 4 for weight in trained)

    if config.gather == "step":
        at_once = sum(map(gathered, layers))
    else:  # FSDP2 gathers the next layer while one is at work; a process on its own has nothing to wait for
        at_once = max(map(gathered, layers)) * (2 if shards > 1 else 1)
    gathered_root, whole = gathered(root), gathered(root) + at_once
    head = sum(weight.elements * compute_bytes for weight in root if weight.trained and weight.group in ("head", TIED))
    gradients = gradient_bytes(cut, shards)
    last = gradients
    if config.gather == "step" and micro_batches > 1:
        last = sum(weight.elements * 4 for weight in cut if weight.trained)
    earlier = last if micro_batches > 1 else 0  # those of the micro-batches before
    # moment, gradients, gathered, reducing, activations
    moments: tuple[tuple[str, int, int, int, int], ...] = (
        ("in the vision tower", earlier, gathered_root, 0, held.tower),
        ("at the loss", earlier, whole, 0, held.loss),
        ("at the start of the backward pass", earlier, whole, max(map(reduced, layers)) + head, held.backward),
        ("at the end of the backward pass", last, whole, reduced(root), 0),
    )
    moment, then, in_use, reducing, live = max(
        moments, key=lambda numbers: sum(numbers[2:]) + (0 if config.offload else numbers[1])
    )
    return Memory(
        tower=parameter_bytes((w for w in weights if w.unit == "tower"), shards, compute_bytes=compute_bytes),
        parameters=parameter_bytes(cut, shards, compute_bytes=compute_bytes),
        gradients=gradients,
        optimizer=optimizer_bytes(cut, shards),
        moment=moment,
        gradients_then=then,
        gathered=in_use,
        reducing=reducing,
        activations=live,
        pixels=pixels,
        offload=config.offload,
    )


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Lengths:
    """Tokens of a run's samples, image rows included: counted for those that were tokenised, estimated for others."""

    tokens: np.ndarray  # (samples,)
    images: np.ndarray  # (samples,)
    image_rows: int  # of an image
    supervised: float  # share of the text
    sampled: int
    unusable: int  # of the sampled


def sample_lengths(samples: Samples) -> Lengths:
    """Tokenise some records and estimate the others by their characters.

    Raises:
        ValueError: not one of them can be used.
    """
    records, processor = samples.records, samples.processor
    rows = processor.rows_per_image
    characters, images = records.num_characters[samples.kept], records.num_images[samples.kept]
    chosen = np.random.RandomState(0).permutation(len(samples))[:SAMPLED_RECORDS]
    usable, of_text, supervised = [], [], []
    for place in chosen:
        try:
            text = processor.text(records[int(samples.kept[place])])
        except ValueError:
            continue
        usable.append(place)
        of_text.append(len(text.input_ids) - rows * text.num_images)
        supervised.append(text.num_supervised)
    if not usable:
        raise ValueError(f"--data.path is {records.path}; not one of {len(chosen)} records can be used")

    # A text has some tokens to begin with, and some for each character.
    design = np.stack([np.ones(len(usable)), characters[usable]], axis=1)
    (first, each), *_ = np.linalg.lstsq(design, np.array(of_text, dtype=np.float64), rcond=None)
    tokens = (first + each * characters).clip(1) + rows * images
    tokens[usable] = of_text + rows * images[usable]
    return Lengths(
        tokens.round().clip(1, processor.max_length).astype(np.int64),
        images,
        rows,
        sum(supervised) / sum(of_text),
        len(chosen),
        len(chosen) - len(usable),
    )


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a run's first steps."""

    largest: MicroBatch
    micro_batches: int  # of a process in a step, at most
    micro_batches_mean: float  # over the steps
    packed: float  # share of the processes' time that useful tokens have; the rest is padding, or waiting for another
    padded: float


def make_batches(config: TrainConfig, lengths: Lengths, order: Order, *, processes: int, total_steps: int) -> Batches:
    """Cut the first steps into micro-batches, packed and padded, as the run would one or the other."""
    used, paid, largest, most_images = 0, {True: 0, False: 0}, 0, 0
    micro_batches: list[int] = []  # by step
    for batch in order.steps(0, min(total_steps, SIMULATED_STEPS)):
        tokens, images = lengths.tokens[batch], lengths.images[batch]
        used += int(tokens.sum())
        budget = max(config.token_budget, int(tokens.max()))
        for packing, bins in (
            (True, pack(tokens.tolist(), budget=budget, num_processes=processes)),
            (False, share(len(batch), per_device=config.per_device_batch_size, num_processes=processes)),
        ):
            # An empty bin is a dummy of one token.
            costs = [tokens[b].sum() if packing else tokens[b].max() * len(b) if b else 1 for b in bins]
            for start in range(0, len(bins), processes):
                paid[packing] += int(max(costs[start : start + processes])) * processes
            if packing == config.data.packing:
                largest = max(largest, int(max(costs)))
                most_images = max(most_images, *(int(images[b].sum()) for b in bins))
                micro_batches.append(len(bins) // processes)
    shape = (1, largest)
    if not config.data.packing:  # sooner or later a batch holds the longest sample
        shape = (min(config.per_device_batch_size, -(-len(batch) // processes)), int(lengths.tokens.max()))
    text = max(1, math.prod(shape) - most_images * lengths.image_rows)
    return Batches(
        MicroBatch(shape, most_images, math.ceil(text * lengths.supervised)),
        max(micro_batches),
        sum(micro_batches) / len(micro_batches),
        used / paid[True],
        used / paid[False],
    )


# ---------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    weights: list[Weight]
    flops: Flops
    batches: Batches
    memory: Memory


def plan_run(
    config: TrainConfig,
    model_config: AlignGPTConfig,
    lengths: Lengths,
    order: Order,
    *,
    processes: int,
    total_steps: int,
) -> Plan:
    """A run's plan for so many processes."""
    dtype = run_folder.DTYPES[config.precision]
    kept_in = torch.float32 if config.optim.kind == "apex" else dtype  # what is not sharded is cast when it is used
    batches = make_batches(config, lengths, order, processes=processes, total_steps=total_steps)
    model = sharding.build(copy.deepcopy(model_config)).to("meta")  # which is changed on the way
    sharding.freeze(model, config.model.train)
    if config.lora.rank:
        lora.add(model, {}, config.lora, seed=config.seed)
    sharding.prepare_layers(model, dataclasses.replace(config.sharding, compile=False))
    weights, flops = weights_of(model), count_flops(model)
    # Pixels come a step at a time: the one at work, those in hand, and the one that is being made.
    ready = batches.micro_batches * (config.data.prefetch + 2)
    image_bytes = 3 * model_config.vision_config.image_size**2 * 4
    return Plan(
        weights,
        flops,
        batches,
        memory(
            weights,
            activations(model, batches.largest, dtype),
            shards=config.sharding.size or processes,
            compute_bytes=kept_in.itemsize,
            micro_batches=batches.micro_batches,
            pixels=ready * batches.largest.images * image_bytes,
            config=config.sharding,
        ),
    )


if __name__ == "__main__":
    from training.forecast import main

    raise SystemExit(main())
