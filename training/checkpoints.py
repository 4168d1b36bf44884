"""Checkpoints that a run goes on from: saved while it trains, verified before they are used.

    RUN/checkpoints/step-00000500/
        __0_0.distcp, __1_0.distcp, …   each process's parts of trained weights and of the optimizer's moments
        .metadata                       which part is where (torch.distributed.checkpoint)
        state.json                      step, processes, the run's config, and what the loop adds
        manifest.json                   size and SHA-256 of all the others
    RUN/LATEST                          name of the checkpoint to go on from

A checkpoint holds no random state, schedule or position: sample order, learning rate and random streams are functions
of (seed, step), and both are in state.json.

Saving. `save` starts a thread and returns. The thread copies this process's parts to host memory, from where on the
optimizer may change them (`wait_staged`), then writes them to step-….tmp, hashes them and waits for the others; process
0 adds the JSON files and renames the folder. Every file is on the disk before that, every name before LATEST changes,
and old checkpoints go last; so at any moment, LATEST names a whole checkpoint. An error is the same in all processes.

Loading. `find` takes the newest checkpoint whose files are those of its manifest, from LATEST backwards, and says what
is wrong with the others. No pickle is run: shards are read by PyTorch's tensor-only reader, and .metadata by an
unpickler that knows the classes of DCP's tables and no other.
"""

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from aligngpt.checkpoint import check_names
from aligngpt.data.tables import sync_to_disk, whole_file
from training.config import TrainConfig, differences, to_json
from training.sharding import World

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
FOLDER, LATEST, MANIFEST, STATE, METADATA = "checkpoints", "LATEST", "manifest.json", "state.json", ".metadata"
_LONGEST_WAIT = timedelta(hours=1)  # until the slowest process has written its part
_LAST_WAIT_SECONDS = 60  # for a save, when the run has failed


class SaveError(ValueError):
    """A checkpoint could not be written; the message is the same in all processes."""


# ---------------------------------------------------------------------------------------------------- saving


class Checkpoints:
    """Saves the checkpoints of one run, as a context; all processes make one and call it at the same steps.

    after: the checkpoint that the run goes on from. Those that were passed over for it, and later ones, go when the
    next one is in place.

    Host memory for this process's parts is taken at the first save and kept (pinned where the parts are on a GPU).
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        after: "Saved | None" = None,
    ):
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.world = world
        self.folder = Path(config.run_dir) / FOLDER
        self.good = [*after.earlier, after.folder.name] if after else []  # oldest first
        self.group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)  # the thread's own collectives
        self.buffers: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.staged = threading.Event()
        self.copied: torch.cuda.Event | None = None  # the GPU's side of `staged`
        self.error: Exception | None = None
        self.seconds = 0.0  # that the last save took, until it was on the disk

    def save(self, step: int, extra: dict[str, Any]) -> None:
        """Begin to write the checkpoint after `step` steps, once the one before is written.

        extra: what the loop needs to go on beside weights and optimizer, as JSON values; they are taken down here.

        Raises:
            SaveError: the one before could not be written.
        """
        self.wait()
        state = {"step": step, "processes": self.world.size, "config": to_json(self.config), "extra": extra}
        # A step count that stands in a group (apex) and not with each parameter.
        state["group_steps"] = [int(group.get("step", 0)) for group in self.optimizer.param_groups]
        text = json.dumps(state) + "\n"
        tensors = _tensors(self.model, self.optimizer)
        on_gpu = self.world.device.type == "cuda"
        computed = torch.cuda.current_stream().record_event() if on_gpu else None
        self.staged.clear()
        self.thread = threading.Thread(
            target=self._run, args=(step, tensors, text, computed), name="checkpoint", daemon=True
        )
        self.thread.start()

    def wait_staged(self) -> None:
        """Return when the weights may be changed again; on a GPU, its stream waits and the host does not."""
        if self.thread is not None:
            self.staged.wait()
            if self.copied is not None:
                torch.cuda.current_stream().wait_event(self.copied)

    def failed(self) -> bool:
        """Whether `wait` would raise an error at once; no collective. Other processes may know a moment later."""
        return self.error is not None

    def wait(self) -> None:
        """Return when the last save is on the disk.

        Raises:
            SaveError: it could not be written. RuntimeError: for a reason that is not the disk's.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join(_LAST_WAIT_SECONDS)
            if self.error is not None:
                logger.error("%s", self.error)

    def _run(self, step: int, tensors: dict[str, Tensor], state: str, computed: torch.cuda.Event | None) -> None:
        """The thread."""
        try:
            if computed is not None:
                torch.cuda.set_device(self.world.device)
            with torch.no_grad():
                self._write(step, tensors, state, computed)
        except BaseException as error:  # DCP's CheckpointException is no Exception
            self.error = self._told(error, step, sum(tensor.nbytes for tensor in tensors.values()))
        finally:
            self.staged.set()

    def _write(self, step: int, tensors: dict[str, Tensor], state: str, computed: torch.cuda.Event | None) -> None:
        started = time.perf_counter()
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_suffix(".tmp")
        try:
            self._agree(lambda: self._stage(tensors, computed))
            dcp.save(
                tensors,
                storage_writer=_Writer(temporary, per_thread_copy_ahead=0),
                planner=_StagedPlanner(self.buffers),
                process_group=self.group,
            )
            ours = f"__{self.world.rank}_*.distcp"
            hashed = self._agree(lambda: {path.name: _fingerprint(path) for path in temporary.glob(ours)})
            files = {name: fingerprint for of_process in hashed for name, fingerprint in of_process.items()}
            self._agree(lambda: self._finish(temporary, final, files, state) if self.world.rank == 0 else None)
        except BaseException:
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.good = [*(name for name in self.good if name != final.name), final.name]
        self.seconds = time.perf_counter() - started
        if self.world.rank == 0:
            num_bytes = sum(fingerprint["bytes"] for fingerprint in files.values())
            logger.info("%s: %s MB written in %.1f s", final.name, f"{num_bytes / 1e6:,.1f}", self.seconds)

    def _stage(self, tensors: dict[str, Tensor], computed: torch.cuda.Event | None) -> None:
        """Copy this process's part of each tensor to host memory."""
        stream = None
        if computed is not None:
            stream = torch.cuda.Stream()
            stream.wait_event(computed)
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if name not in self.buffers:
                    self.buffers[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                self.buffers[name].copy_(part, non_blocking=True)
        if stream is not None:
            self.copied = stream.record_event()
        self.staged.set()
        if self.copied is not None:
            self.copied.synchronize()

    def _finish(self, temporary: Path, final: Path, files: dict[str, dict[str, Any]], state: str) -> None:
        """Make what all have written a checkpoint, and let old ones go. Process 0 alone."""
        for name, fingerprint in files.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != fingerprint["bytes"]:
                raise OSError(f"{temporary / name} is not seen by process 0; --run-dir needs to be shared by all")
        (temporary / STATE).write_text(state, encoding="utf-8")
        files |= {name: _fingerprint(temporary / name) for name in (METADATA, STATE)}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
        # METADATA too: DCP syncs it before its last bytes have left Python's buffer.
        for path in (*(temporary / name for name in (METADATA, STATE, MANIFEST)), temporary):
            sync_to_disk(path)
        discard(final)  # of a run that went back
        os.replace(temporary, final)
        sync_to_disk(self.folder)
        with whole_file(self.folder.parent / LATEST, sync=True) as latest:
            latest.write_text(final.name + "\n", encoding="utf-8")
        sync_to_disk(self.folder.parent)
        kept = [*(name for name in self.good if name != final.name), final.name][-self.config.keep_last :]
        for path in self.folder.iterdir():
            if _is_name(path.name) and path.name not in kept:
                try:
                    discard(path)
                except OSError as error:
                    logger.warning("%s is not needed any more and cannot be removed: %s", path, error)

    def _agree(self, part: Callable[[], Result]) -> list[Result]:
        """What `part()` gives in each process; where it fails in one, all raise that."""
        result: Result | None = None
        failure: Exception | None = None
        try:
            result = part()
        except Exception as error:
            failure = _portable(error)
        everyones: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyones, (result, failure), group=self.group)
        for _, of_process in everyones:
            if of_process is not None:
                raise of_process
        return [value for value, _ in everyones]

    def _told(self, error: BaseException, step: int, num_bytes: int) -> Exception:
        """The error that the run ends with."""
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        says = f"the checkpoint of step {step} could not be written to --run-dir {self.config.run_dir}"
        before = f"the one before, {self.good[-1]}, is whole" if self.good else "there is none before"
        told: Exception
        if not isinstance(error, OSError):
            told = RuntimeError(f"{says}; {before}")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            told = SaveError(
                f"{says}, whose disk is full ({error}); it needs {num_bytes / 1e9:.3g} GB; {before}, and the same "
                "command goes on from it"
            )
        else:
            told = SaveError(f"{says}: {error}; {before}")
        told.__cause__ = error
        return told


def discard(path: Path) -> None:
    """Remove a file or folder, under a name ending in .tmp from the first moment on."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix != ".tmp":
        doomed = path.with_name(path.name + ".old.tmp")
        discard(doomed)
        path = path.replace(doomed)
    shutil.rmtree(path)


class _Writer(dcp.FileSystemWriter):
    """DCP's, which loses the disk's error on the way, and would write the folder's name into the checkpoint."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, *args: Any) -> Any:
        try:
            return super().write_data(*args)
        except Exception as error:
            raise _portable(error) from error


class _StagedPlanner(DefaultSavePlanner):
    """Plans by the tensors that are given and writes their copies."""

    def __init__(self, staged: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged = staged

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.staged[index.fqn]


def _portable(error: Exception) -> Exception:
    """The disk's error where there is one behind this one, or one that another process can receive."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return OSError(*cause.args) if cause.args else OSError(str(cause))
        cause = cause.__cause__ or cause.__context__
    return RuntimeError(f"{type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are as they were written."""

    folder: Path
    step: int
    extra: dict[str, Any]  # what was given to `save`
    group_steps: list[int]
    earlier: list[str]  # names of the checkpoints before it, oldest first, unverified


def find(config: TrainConfig, world: World) -> Saved | None:
    """The checkpoint to go on from, the same in all processes; None: there has not been one yet.

    All files of a checkpoint are read for it, each by one of the processes.

    Raises:
        ValueError: there are some and none is whole (the message says what is wrong with each), or it belongs to a run
            with another config.
    """
    run = Path(config.run_dir)
    names: list[str] = world.gather(_candidates(run) if world.rank == 0 else [])[0]
    damaged = []
    for position, name in enumerate(names):
        try:
            problem = _damage(run / FOLDER / name, world.rank, world.size)
        except OSError as error:
            problem = f"it cannot be read ({error})"
        problem = next(filter(None, world.gather(problem)), None)
        if problem is None:
            state = json.loads((run / FOLDER / name / STATE).read_text(encoding="utf-8"))
            different = differences(to_json(config), state["config"])
            if different or state["step"] != _step_of(name):
                what = f"step {state['step']}; " + "; ".join(different)
                raise ValueError(f"{run / FOLDER / name} is another run's or another step's checkpoint: {what}")
            earlier = names[:position:-1]
            return Saved(run / FOLDER / name, state["step"], state["extra"], state["group_steps"], earlier)
        damaged.append(f"{name}: {problem}")
        if world.rank == 0:
            logger.warning("%s/%s/%s is passed over: %s", run, FOLDER, name, problem)
    if damaged or (run / LATEST).exists():
        raise ValueError(
            f"--run-dir is {run}, which has no whole checkpoint to go on from ({'; '.join(damaged) or 'none at all'}); "
            "it needs one of them put back, or a new folder"
        )
    return None


def steps_saved(config: TrainConfig) -> int:
    """The step of the checkpoint that a run would go on from if it is whole, 0 without one."""
    return next(map(_step_of, _candidates(Path(config.run_dir))), 0)


def load(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint into model and optimizer; any number of processes may have written it.

    Raises:
        ValueError: it is of another model (names or shapes are listed), or holds something else than tensors.
    """
    metadata = _read_metadata(saved.folder)
    _make_moments(model, optimizer, {name.rpartition(".")[0] for name in metadata.state_dict_metadata})
    tensors = _tensors(model, optimizer)
    _check_fits(metadata, tensors, saved.folder)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with torch.no_grad():
            dcp.load(dict(tensors), storage_reader=_Reader(saved.folder, metadata), planner=planner)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{saved.folder} cannot be loaded: {cause}") from error
    for group, step in zip(optimizer.param_groups, saved.group_steps, strict=True):
        if "step" in group:
            group["step"] = step


def _candidates(run: Path) -> list[str]:
    """Names of checkpoints, newest first: what LATEST names and those before it, or all where it names none."""
    names = sorted((path.name for path in (run / FOLDER).glob("step-*") if _is_name(path.name)), reverse=True)
    try:
        latest = (run / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return names
    return [name for name in names if name <= latest] if _is_name(latest) else names


def _is_name(name: str) -> bool:
    return len(name) == len("step-00000000") and name.startswith("step-") and name[5:].isdecimal()


def _step_of(name: str) -> int:
    return int(name[5:])


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _damage(folder: Path, rank: int, processes: int) -> str | None:
    """What is wrong with a checkpoint, or None, as far as one process's share of its files goes."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        wanted = {name: (fingerprint["bytes"], fingerprint["sha256"]) for name, fingerprint in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    missing = [name for name in (METADATA, STATE) if name not in wanted]
    if missing or any(Path(name).name != name for name in wanted):
        return f"{MANIFEST} is damaged"
    for number, (name, (num_bytes, sha256)) in enumerate(sorted(wanted.items())):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {num_bytes}"
        if number % processes == rank and _fingerprint(path)["sha256"] != sha256:
            return f"{name} has been changed: its SHA-256 is not the one in {MANIFEST}"
    return None


_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what DCP's .metadata consists of, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    """DCP's table of a checkpoint, which may hold nothing but tensors in files of the manifest."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
        foreign = [entry.relative_path for entry in metadata.storage_data.values() if entry.relative_path not in files]
        others = [name for name, entry in metadata.state_dict_metadata.items() if not _is_tensor(entry)]
        if foreign or others:
            raise pickle.UnpicklingError(f"it has what is no tensor of this checkpoint: {[*foreign, *others][0]!r}")
    except Exception as error:  # a pickle's bytes can call for anything that its classes cannot do
        raise ValueError(f"{folder / METADATA} is refused, it needs to be one that a save wrote: {error}") from error
    return metadata


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, TensorStorageMetadata)


class _Reader(dcp.FileSystemReader):
    """DCP's, with a table that has been read already."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds: trained weights, and the tensors that the optimizer keeps for them, by flat names."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained}
    tensors: dict[str, Tensor] = {f"model.{name}": parameter for parameter, name in names.items()}
    for parameter, state in optimizer.state.items():
        name = f"optimizer.{names[parameter]}"
        tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors


def _make_moments(model: nn.Module, optimizer: torch.optim.Optimizer, stored: set[str]) -> None:
    """Let a new optimizer make the tensors that are stored, by a step of gradient 0 and rate 0.

    Not all are, or none, where the checkpoint came before a first step that was not skipped.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f"optimizer.{name}" in stored:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _check_fits(metadata: Metadata, tensors: dict[str, Tensor], folder: Path) -> None:
    stored = {name: tuple(getattr(entry, "size", ())) for name, entry in metadata.state_dict_metadata.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for prefix in ("model.", "optimizer."):
        theirs, ours = (
            {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            for shapes in (stored, wanted)
        )
        check_names(theirs, ours, source=str(folder))
        wrong = [
            f"{name} is {theirs[name]}, the model's is {shape}" for name, shape in ours.items() if theirs[name] != shape
        ]
        if wrong:
            shown = f"{'; '.join(wrong[:12])}{' …' if len(wrong) > 12 else ''}"
            raise ValueError(f"{folder} does not hold this model's weights; {shown}")
