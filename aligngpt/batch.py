"""Examples to a batch, padded or packed, with the injection plan and the supervised rows: all made on the host.

Samples keep their order and their content. Text-only and image samples mix freely; a batch without an image carries
`pixel_values` of zero images, so that every rank of a sharded run does the same work.
"""

import os
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from aligngpt_kernels import InjectionPlan, injection_plan
from aligngpt_kernels.dispatch import to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from .text import IGNORE_INDEX, TokenIds, Tokenized


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sample ready for the model."""

    id: str
    text: Tokenized
    pixel_values: Tensor  # (images, 3, size, size) fp32
    level: int | None = None  # alignment level 0..N-1, None where the gate makes H


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B samples as B rows padded to L tokens, or packed: B is 1 and L the T tokens of all samples, end to end.

    M images, S samples with an image. Which of the S a supervised row belongs to is `plan.token_sample[rows]`.
    """

    ids: list[str]
    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor | None  # (B, L) int64; None: packed
    labels: Tensor  # (B, L) int64, -100 where no loss is taken, not shifted
    gate_mask: Tensor  # (B, L) bool
    pixel_values: Tensor  # (M, 3, size, size) fp32
    align_levels: Tensor | None  # (S,) int64
    plan: InjectionPlan
    rows: Tensor  # (supervised,) int64 indices into (B·L): where a supervised token is predicted
    position_ids: Tensor | None = None  # (1, T) int64, packed only, as are the next three
    cu_seqlens: Tensor | None = None  # (samples + 1,) int32: where each sample begins, and T
    max_seqlen: int | None = None
    seq_lengths: tuple[int, ...] | None = None  # of the samples, as numbers: they stay on the host

    @property
    def num_supervised(self) -> int:
        return self.rows.shape[0]

    @property
    def num_tokens(self) -> int:
        """All but padding, image rows included."""
        if not self.ids:
            return 0
        return self.input_ids.shape[1] if self.attention_mask is None else int(self.attention_mask.sum())

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's `forward`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "ids"}
        return {name: value for name, value in values.items() if value is not None}

    def trainer_inputs(self) -> dict[str, Any]:
        """`model_inputs` as transformers' Trainer moves them to a device: without the plan, which the model then makes.

        Use it as `data_collator=lambda examples: processor.collate(examples).trainer_inputs()`.
        """
        return {name: value for name, value in self.model_inputs().items() if name != "plan"}

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, without waiting for what runs there."""

        def move(value: Any) -> Any:
            if isinstance(value, InjectionPlan):
                return value.to(device)
            return to_device(value, device) if isinstance(value, Tensor) else value

        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


def collate(
    examples: Sequence[Example], *, token_ids: TokenIds, rows_per_image: int, image_size: int, packed: bool = False
) -> Batch:
    """Pad on the right, or pack end to end, and plan the injection.

    Packed, no sample's first token keeps a label: what stands before it is another sample. Without an example the
    batch is one padding token that nothing is learned from, so that a process with nothing to do takes part.

    Raises:
        ValueError: a sample's image tokens do not match its images, or some samples with an image have a level and
            others none.
    """
    for example in examples:
        have = int((example.text.input_ids == token_ids.image).sum())
        if have != example.pixel_values.shape[0] * rows_per_image:
            raise ValueError(
                f"sample {example.id}: {have} image tokens for {example.pixel_values.shape[0]} images; "
                f"{rows_per_image} per image are needed"
            )
    with_image = [example for example in examples if example.pixel_values.shape[0]]
    unlevelled = [example.id for example in with_image if example.level is None]
    if unlevelled and len(unlevelled) < len(with_image):
        raise ValueError(f"sample {unlevelled[0]} has no alignment level; others of its batch have one")
    # Without an image there is nothing to look up: the gate's path then keeps table and gate in the graph.
    levelled = with_image and not unlevelled
    levels = torch.tensor([example.level for example in with_image], dtype=torch.int64) if levelled else None

    texts = [example.text for example in examples]
    if not texts:
        texts = [Tokenized(torch.tensor([token_ids.pad]), torch.tensor([IGNORE_INDEX]), torch.tensor([False]), 0)]
    seq_lengths = tuple(text.input_ids.shape[0] for text in texts)

    def join(name: str, padding: Any) -> Tensor:
        parts = [getattr(text, name) for text in texts]
        return torch.cat(parts)[None] if packed else pad_sequence(parts, batch_first=True, padding_value=padding)

    input_ids, labels = join("input_ids", token_ids.pad), join("labels", IGNORE_INDEX)
    special: dict[str, Any] = {"image_token_id": token_ids.image, "align_token_id": token_ids.align}
    layout: dict[str, Any]
    if packed:
        cu_seqlens = ends(seq_lengths)
        position_ids = positions(cu_seqlens, input_ids.shape[1])[None]
        labels = labels.masked_fill(position_ids == 0, IGNORE_INDEX)
        layout = {
            "attention_mask": None,
            "position_ids": position_ids,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max(seq_lengths),
            "seq_lengths": seq_lengths,
            "plan": injection_plan(input_ids[0], cu_seqlens=cu_seqlens, **special),
        }
    else:
        mask = torch.arange(input_ids.shape[1]) < torch.tensor(seq_lengths)[:, None]
        layout = {"attention_mask": mask.long(), "plan": injection_plan(input_ids, **special)}
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    empty = torch.zeros(0, 3, image_size, image_size)
    return Batch(
        ids=[example.id for example in examples],
        input_ids=input_ids,
        labels=labels,
        gate_mask=join("gate_mask", False),
        pixel_values=torch.cat([empty, *(example.pixel_values for example in examples)]),
        align_levels=levels,
        rows=(shifted.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1),
        **layout,
    )


def ends(seq_lengths: Sequence[int]) -> Tensor:
    """`cu_seqlens` (N + 1,) int32 on the host: 0, and where each sequence ends."""
    return torch.nn.functional.pad(torch.tensor(seq_lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: each token's place in its sequence."""
    place = torch.arange(num_tokens, device=cu_seqlens.device)
    return place - cu_seqlens.long()[sequences(cu_seqlens, num_tokens)]


def sequences(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: the sequence each token belongs to."""
    place = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(place, cu_seqlens[1:].contiguous(), right=True)


def load_in_order(dataset: Dataset[Any], keys: Iterable[Any], *, workers: int) -> Iterator[Any]:
    """`dataset[key]` for each key, in order, made ahead of time by `workers` processes; with 0 it is made here.

    Items come back through pipes, not through shared memory, which is small in containers and kills who fills it.

    ChildProcessError: a worker was killed or crashed. It is raised by the next item, or where the main thread waits in
    `waiting_for_workers`.
    """
    if not workers:
        return map(dataset.__getitem__, keys)
    # The tokenizer's own threads do not survive the fork into workers; said here, it need not be warned about.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = iter(
        DataLoader(
            _Packed(dataset),
            sampler=keys,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_ended_by_its_parent_alone,
            prefetch_factor=4,
        )
    )
    if threading.current_thread() is threading.main_thread():
        _hold_back_deaths()
    return _unpacked(loader)


def _ended_by_its_parent_alone(worker: int) -> None:
    """What sends SIGTERM to a whole group of processes, as torchrun does, leaves the end to the one that loads for.

    That one may still want items. Its own SIGTERM ends a worker, and so does its death.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="SIGTERM", daemon=True).start()


def _unpacked(loader: Iterator[bytes]) -> Iterator[Any]:
    while True:
        try:
            with waiting_for_workers():
                packed = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise _death(error) from error
            raise
        yield pickle.loads(packed)


_deaths: list[ChildProcessError] = []  # of workers, which nobody has been told of
_is_waiting = False  # whether the main thread is


@contextmanager
def waiting_for_workers() -> Iterator[None]:
    """Where a worker's death may be raised. Outside it would hit the main thread anywhere, in a save for example.

    Only here it is needed: what a dying worker has sent in part is waited for without end.
    """
    global _is_waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _is_waiting = True
    try:
        if _deaths:
            raise _deaths.pop()
        yield
    finally:
        _is_waiting = False


def _hold_back_deaths() -> None:
    """Put a handler around PyTorch's, which raises a death as soon as the signal comes."""
    _deaths.clear()
    theirs: Any = signal.getsignal(signal.SIGCHLD)
    if getattr(theirs, "holds_back", False):
        return

    def handler(number: int, frame: Any) -> None:
        try:
            theirs(number, frame)
        except RuntimeError as error:
            if _is_waiting:
                raise _death(error) from error
            _deaths.append(_death(error))

    handler.holds_back = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, handler)


def _death(error: RuntimeError) -> ChildProcessError:
    what = " ".join(str(error).split()).rstrip(".")
    return ChildProcessError(
        f"a process that loads samples was killed or crashed ({what}); that is mostly for want of memory, of which "
        "fewer workers need less"
    )


class _Packed(Dataset[bytes]):
    """The items of a dataset as bytes, which no tensor's memory is shared for."""

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, key: Any) -> bytes:
        return pickle.dumps(self.dataset[key], protocol=pickle.HIGHEST_PROTOCOL)


def _as_it_is(loaded: Any) -> Any:
    return loaded
