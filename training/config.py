"""What a training run is: frozen dataclasses, presets, the command line.

A preset is a function of the stage that returns a `TrainConfig`; the stages differ in nothing but such values. The
command line names a preset and overrides any field (`--optim.lr 1e-4`), so a run is one preset and its overrides, and
the resolved config in the run folder is the whole of it. This file imports neither torch nor transformers: a wrong
value is refused before anything heavy is loaded.

Hyper-parameters: AlignGPT (arXiv 2405.14129), the scripts of its public implementation for the per-device sizes.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Stage = Literal["pretrain", "finetune"]
TrainedPart = Literal["llm", "projector", "gate", "table"]  # the vision tower is frozen, always
NO_SHARDS_IN_APEX = "apex's FusedAdam takes no sharded weights (DTensors); it needs one process"
LEVEL_WORDS = ("record", "random", "none")  # what --data.levels may be beside a file


@dataclass(frozen=True)
class ModelConfig:
    """Which weights the run starts from and which of them it trains."""

    llm: str = ""
    """Folder of the LLM of a new model (config.json, weights, tokenizer)."""
    vision: str = ""
    """Folder of the CLIP or SigLIP tower of a new model (config.json, weights, preprocessor_config.json)."""
    init: str = ""
    """AlignGPT folder to start from instead: what the first stage left in RUN/model, or public weights."""
    align_mode: Literal["adaptive", "local", "global", "average", "none"] | None = None
    """How a sample's alignment row is made without a level. None: as --model.init says, "adaptive" for a new model."""
    num_levels: int | None = None
    """Rows of the alignment table of a new model. None: 8."""
    gate_text: Literal["prompt", "all"] | None = None
    """Which text the gate averages. None: as --model.init says, "prompt" for a new model."""
    random_table: bool = False
    """Ablation: a random alignment table instead of the one in --model.init."""
    train: tuple[TrainedPart, ...] = ("projector", "table")
    """The trained parts; all else is frozen."""


@dataclass(frozen=True)
class DataConfig:
    """Which samples, in which order, written out how."""

    path: str = ""
    """LLaVA JSON file, the same as JSON lines (.jsonl), or a folder of shards (`aligngpt pack`)."""
    image_folder: str = ""
    """Folder that the records' image paths are relative to. Shards hold their images and take none."""
    levels: str = "record"
    """Alignment level of a sample: from a file that `aligngpt levels` made, or one of three words.
    "record" takes the record's align_level, "random" draws one, "none" leaves the sample to the gate."""
    levels_hash: str = ""
    """Hash of the --data.levels file. Filled in by the run, which is then never resumed with other levels."""
    template: Literal["plain", "v1", "llama_2", "chat"] = "plain"
    """Conversation template; "chat" is the tokenizer's own."""
    image_aspect_ratio: Literal["square", "pad"] = "square"
    """How an image is made square: its centre is cut out, or it is padded with the mean colour."""
    max_length: int = 2048
    """Longest sequence in tokens; what is longer is cut."""
    packing: bool = True
    """Sequences lie end to end in micro-batches of --token-budget tokens; otherwise each is padded to the longest."""
    order: Literal["shuffle", "grouped"] = "shuffle"
    """Plain shuffle, or, for padded batches, one in which a batch holds only text or only images, sorted by length."""
    decoder: Literal["auto", "dali", "pil"] = "auto"
    """What decodes and resizes images; the two differ by up to 4/255.
    "auto" is DALI where it is installed, else PIL, and a run keeps what it began with."""
    workers: int = 4
    """Processes that load samples, for each training process; 0 loads in the training process."""
    prefetch: int = 2
    """Steps whose pixels are ready while the model is at work."""
    hardware_decoder: float = 0.0
    """Share of JPEG images, from 0 to 1, that a GPU's decoding unit gets; its pixels differ a little from others'."""
    max_drop_rate: float = 0.01
    """Largest share of the run's samples that may be dropped because they cannot be used; above it the run stops."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine decay to 0."""

    kind: Literal["torch", "apex"] = "torch"
    """PyTorch's fused AdamW, or apex's FusedAdam, which takes a single process and no sharding."""
    lr: float = 1e-3
    """Peak learning rate."""
    projector_lr: float | None = None
    """Peak learning rate of the projector. None: the same as --optim.lr."""
    align_lr: float | None = None
    """Peak learning rate of the alignment table and the gate. None: the same as --optim.lr."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.0
    """Decay of weight matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How much of AdamW's two moments a step keeps."""
    eps: float = 1e-8
    """What AdamW adds to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all trained weights together."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the LLM, which train instead of its weights and are merged into them in RUN/model."""

    rank: int = 0
    """Rank of the adapters. 0: there are none."""
    alpha: float = 16.0
    """What an adapter adds is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as q_proj. None named: all in the decoder layers."""


@dataclass(frozen=True)
class ShardingConfig:
    """How the model lies on the processes, and what is kept or made again to save memory."""

    size: int = 0
    """Processes that share one copy of the weights; several copies are kept equal (HSDP). 0: all share one."""
    gather: Literal["layer", "step"] = "layer"
    """A decoder layer's weights are gathered when it runs and freed after, or gathered once in a step.
    "step" keeps gradients whole too, and reduces them once: faster with several micro-batches, if memory allows."""
    offload: bool = False
    """Weights, gradients and optimizer lie in the host's memory."""
    activation_checkpointing: Literal["full", "selective", "none"] = "full"
    """What a decoder layer computes again in its backward pass: all, all but matrix products and attention, nothing."""
    compile: bool = False
    """Decoder layers are compiled by torch.compile."""


@dataclass(frozen=True)
class GuardConfig:
    """When a step is skipped, noted, or ends the run."""

    max_skipped: int = 5
    """Steps in a row that may be skipped because loss or gradient is not finite; after so many the run stops."""
    spike: float = 6.0
    """A loss this many standard deviations above its running mean is noted in RUN/spikes.jsonl."""


@dataclass(frozen=True)
class LogConfig:
    """Where a run shows itself, beside RUN/metrics.jsonl and its progress bar."""

    tensorboard: bool = False
    """Curves in RUN/tensorboard."""
    wandb: str = ""
    """Weights & Biases project that the curves go to."""
    peak_tflops: float | None = None
    """The device's peak in dense bf16, in TFLOP/s, for MFU where it is none of the known GPUs."""


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    run_dir: str = ""
    """Folder that receives config.json, metrics.jsonl, checkpoints/ and, at the end, model/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    global_batch_size: int = 256
    """Samples an optimizer step sees, over all processes."""
    token_budget: int = 20480
    """Tokens a process takes through the model at once; the rest of a step follows in further micro-batches."""
    per_device_batch_size: int = 32
    """The same in samples, for padded batches (--data.no-packing)."""
    epochs: int = 1
    """Times that the run goes through the data."""
    max_steps: int | None = None
    """Optimizer steps of the run, instead of --epochs."""
    seed: int = 0
    """Decides new weights, the order of samples, random levels and dropout."""
    deterministic: bool = False
    """On a GPU, take only operations that give the same bits each time, such as flash attention's slower backward pass:
    a run that is resumed is then bit-equal. On a CPU all are."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; trained weights and optimizer are fp32 either way."""
    save_every: int = 500
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Checkpoints kept in the run folder."""
    resume: bool = True
    """Go on from the run folder's last checkpoint; without it a folder that holds a run is refused."""
    export_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of trained weights in RUN/model; frozen weights are copied as they were."""
    dry_run: bool = False
    """Say what the run needs, and do not start it."""
    processes: int | None = None
    """Processes that --dry-run plans for. None: as many as there are."""
    profile: bool = False
    """Write RUN/profile: a trace of three steps of the first process, the third to fifth from here, and a summary."""
    tokens_per_second: float | None = None
    """Rate of all processes together, for the hours that --dry-run tells. None: by the device's known rates, and
    where it has none an MFU of 40 % is assumed."""


def aligngpt_7b(stage: Stage) -> TrainConfig:
    """Vicuna-7B with CLIP ViT-L/14-336, as in the paper; per-device sizes are those of its 8 × 80 GB."""
    if stage == "pretrain":
        return TrainConfig()
    return TrainConfig(
        model=ModelConfig(train=("llm", "projector", "gate")),
        data=DataConfig(levels="none", template="v1", image_aspect_ratio="pad"),
        optim=OptimConfig(lr=2e-5),
        global_batch_size=128,
        token_budget=16384,
        per_device_batch_size=16,
        export_dtype="bf16",
    )


def aligngpt_13b(stage: Stage) -> TrainConfig:
    """Vicuna-13B: the same hyper-parameters in smaller micro-batches."""
    preset = aligngpt_7b(stage)
    return dataclasses.replace(
        preset,
        token_budget=preset.token_budget // 2,
        per_device_batch_size=preset.per_device_batch_size // 2,
    )


def tiny(stage: Stage) -> TrainConfig:
    """Small models on a CPU: fp32, 8 samples a step, and a rate at which 20 steps show something."""
    preset = aligngpt_7b(stage)
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, max_length=512, workers=1),
        optim=dataclasses.replace(preset.optim, lr=1e-3 if stage == "pretrain" else 2e-4),
        sharding=dataclasses.replace(preset.sharding, activation_checkpointing="none"),
        global_batch_size=8,
        token_budget=2048,
        per_device_batch_size=4,
        precision="fp32",
        save_every=50,
        export_dtype="fp32",
    )


PRESETS: dict[str, Callable[[Stage], TrainConfig]] = {
    "aligngpt-7b": aligngpt_7b,
    "aligngpt-13b": aligngpt_13b,
    "tiny": tiny,
}

# Fields that say where and how fast a run goes, not what it learns: they may differ when it is resumed.
NOT_LEARNED = frozenset(
    (
        "run_dir",
        "resume",
        "save_every",
        "keep_last",
        "deterministic",
        "token_budget",
        "per_device_batch_size",
        "sharding.size",
        "sharding.gather",
        "sharding.offload",
        "sharding.activation_checkpointing",
        "sharding.compile",
        "guard.max_skipped",
        "guard.spike",
        "log.tensorboard",
        "log.wandb",
        "log.peak_tflops",
        "export_dtype",
        "dry_run",
        "processes",
        "profile",
        "tokens_per_second",
        "data.workers",
        "data.prefetch",
        "data.max_drop_rate",
    )
)


def read_command_line(stage: Stage, args: list[str] | None = None) -> TrainConfig:
    """The config that `PRESET --field value …` asks for, checked.

    A command line that is not understood ends the process with status 2, an unknown name with what it may be; only the
    first process of a machine prints.

    Raises:
        ValueError: a value that cannot work; see `check`.
    """
    args = sys.argv[1:] if args is None else args
    prog = f"training/{stage}.py"
    problem = unknown_names(args, PRESETS["tiny"](stage))
    if problem:
        if is_first_on_machine():
            print(f"error: {problem}; {prog} PRESET --help lists all", file=sys.stderr, flush=True)
        raise SystemExit(2)

    import tyro

    config: TrainConfig = tyro.extras.overridable_config_cli(
        {name: (_first_sentence(preset), preset(stage)) for name, preset in PRESETS.items()},
        args=args,
        prog=prog,
        console_outputs=is_first_on_machine(),
    )
    config = with_absolute_paths(config)
    check(config, world_size=config.processes or int(os.environ.get("WORLD_SIZE", "1")))
    return with_levels_hash(config)


def unknown_names(args: list[str], config: TrainConfig) -> str | None:
    """What is wrong with the names of preset and flags and which are nearest; None if they are all known."""
    if args and not args[0].startswith("-") and args[0] not in PRESETS:
        return f"{args[0]} is no preset; it needs to be one of {', '.join(PRESETS)}"
    known = {"--help"}
    for name, value in flat(dataclasses.asdict(config)).items():
        flag = name.replace("_", "-")
        known.add(f"--{flag}")
        if isinstance(value, bool):
            group, _, leaf = flag.rpartition(".")
            known.add(f"--{group}{'.' if group else ''}no-{leaf}")
    for word in args:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            nearest = difflib.get_close_matches(flag, known, n=3, cutoff=0.5)
            return f"{flag} is no option" + (f"; the nearest are {', '.join(nearest)}" if nearest else "")
    return None


def is_first_on_machine() -> bool:
    """Whether this process is the one that speaks for its machine (torchrun's local rank 0, or not under torchrun)."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same config with every path absolute, so that a run folder says which files it came from."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path)) if path else ""

    model, data = config.model, config.data
    levels = data.levels if data.levels in LEVEL_WORDS else absolute(data.levels)
    return dataclasses.replace(
        config,
        run_dir=absolute(config.run_dir),
        model=dataclasses.replace(
            model, llm=absolute(model.llm), vision=absolute(model.vision), init=absolute(model.init)
        ),
        data=dataclasses.replace(
            data, path=absolute(data.path), image_folder=absolute(data.image_folder), levels=levels
        ),
    )


def with_levels_hash(config: TrainConfig) -> TrainConfig:
    """The same config with the hash of its levels file, if it names one.

    Raises:
        ValueError: the config states another hash.
    """
    data = config.data
    found = ""
    if data.levels not in LEVEL_WORDS:
        with open(data.levels, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if data.levels_hash not in ("", found):
        raise ValueError(f"--data.levels-hash is {data.levels_hash}; --data.levels {data.levels} has {found!r}")
    return dataclasses.replace(config, data=dataclasses.replace(data, levels_hash=found))


def check(config: TrainConfig, *, world_size: int = 1) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: names the field, what it got, what it needs.
    """
    model, data, optim = config.model, config.data, config.optim

    def need(good: bool, flag: str, value: Any, needs: str) -> None:
        if not good:
            raise ValueError(f"--{flag} is {value!r}; it needs {needs}")

    for flag, value, least in (
        ("global-batch-size", config.global_batch_size, 1),
        ("token-budget", config.token_budget, data.max_length if data.packing else 1),
        ("per-device-batch-size", config.per_device_batch_size, 1),
        ("lora.rank", config.lora.rank, 0),
        ("sharding.size", config.sharding.size, 0),
        ("guard.max-skipped", config.guard.max_skipped, 1),
        ("epochs", config.epochs, 1),
        ("max-steps", 1 if config.max_steps is None else config.max_steps, 1),
        ("seed", config.seed, 0),
        ("save-every", config.save_every, 1),
        ("keep-last", config.keep_last, 1),
        ("processes", 1 if config.processes is None else config.processes, 1),
        ("data.workers", data.workers, 0),
        ("data.prefetch", data.prefetch, 1),
        ("data.max-length", data.max_length, 8),
        ("model.num-levels", 2 if model.num_levels is None else model.num_levels, 2),
    ):
        need(value >= least, flag, value, f"a whole number of at least {least}")
    projector_lr, align_lr = (optim.lr if lr is None else lr for lr in (optim.projector_lr, optim.align_lr))
    rate = "a rate between 0 and 1"
    share = "a share from 0 to 1"
    rules: tuple[tuple[str, Any, bool, str], ...] = (
        ("data.hardware-decoder", data.hardware_decoder, 0 <= data.hardware_decoder <= 1, share),
        ("data.max-drop-rate", data.max_drop_rate, 0 <= data.max_drop_rate <= 1, share),
        ("optim.lr", optim.lr, 0 < optim.lr < 1, rate),
        ("optim.projector-lr", projector_lr, 0 < projector_lr < 1, rate),
        ("optim.align-lr", align_lr, 0 < align_lr < 1, rate),
        ("lora.alpha", config.lora.alpha, config.lora.alpha > 0, "a positive number"),
        ("lora.dropout", config.lora.dropout, 0 <= config.lora.dropout < 1, "a share of at least 0 and below 1"),
        ("guard.spike", config.guard.spike, config.guard.spike > 0, "a positive number of standard deviations"),
        ("log.peak-tflops", config.log.peak_tflops, (config.log.peak_tflops or 1) > 0, "a positive number"),
        ("tokens-per-second", config.tokens_per_second, (config.tokens_per_second or 1) > 0, "a positive number"),
        ("optim.warmup-ratio", optim.warmup_ratio, 0 <= optim.warmup_ratio < 1, "a share of at least 0 and below 1"),
        ("optim.weight-decay", optim.weight_decay, 0 <= optim.weight_decay < 1, "a number of at least 0 and below 1"),
        ("optim.betas", optim.betas, all(0 <= beta < 1 for beta in optim.betas), "two numbers from 0 to below 1"),
        ("optim.eps", optim.eps, 0 < optim.eps < 1, "a small positive number"),
        ("optim.clip-norm", optim.clip_norm, optim.clip_norm > 0, "a positive norm"),
        ("model.train", model.train, len(set(model.train)) == len(model.train) > 0, "at least one part, each once"),
    )
    for name, given, good, needs in rules:
        need(good, name, given, needs)
    need(data.order == "shuffle" or not data.packing, "data.order", data.order, "padded batches: --data.no-packing")
    need(config.processes is None or config.dry_run, "processes", config.processes, "--dry-run: torchrun starts them")
    need("llm" in model.train or not config.lora.rank, "lora.rank", config.lora.rank, "llm in --model.train")
    if optim.kind == "apex":
        if world_size > 1:
            raise ValueError(f"--optim.kind is 'apex', in {world_size} processes; {NO_SHARDS_IN_APEX}")
        need(not config.sharding.offload, "sharding.offload", True, "--optim.kind torch: apex's model is not sharded")
        from aligngpt.doctor import why_not

        why = why_not("apex")
        need(why is None, "optim.kind", "apex", f"NVIDIA's apex, built from its source with CUDA: {why}")
    size = config.sharding.size
    divides = not size or world_size % size == 0
    need(divides, "sharding.size", size, f"a number that divides the number of processes, {world_size}")
    samples = config.global_batch_size
    need(samples >= world_size, "global-batch-size", samples, f"a sample for each of the {world_size} processes")

    if model.init:
        both = bool(model.llm or model.vision)
        need(not both, "model.init", model.init, "to stand alone, without --model.llm and --model.vision")
        need(model.num_levels is None, "model.num-levels", model.num_levels, "to be left out: --model.init has a table")
        folders = [("model.init", model.init)]
    else:
        need(not model.random_table, "model.random-table", True, "--model.init: a new model's table is random anyway")
        folders = [("model.llm", model.llm), ("model.vision", model.vision)]
    for flag, folder in folders:
        need(folder != "", flag, folder, "a model folder (or give --model.init an AlignGPT folder)")
        need(os.path.isdir(folder), flag, folder, "a folder that exists")
        need(os.path.isfile(os.path.join(folder, "config.json")), flag, folder, "a folder that holds config.json")
    need(os.path.exists(data.path), "data.path", data.path, "a LLaVA JSON file, or shards, that exist")
    good = data.image_folder == "" or os.path.isdir(data.image_folder)
    need(good, "data.image-folder", data.image_folder, "a folder that exists")
    good = data.levels in LEVEL_WORDS or os.path.isfile(data.levels)
    need(good, "data.levels", data.levels, f"{', '.join(LEVEL_WORDS)}, or a file made by `aligngpt levels`")
    need(config.run_dir != "", "run-dir", config.run_dir, "a folder for the run")


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What sets two configs' JSON apart in the fields that decide what is learned, a line each."""

    ours, theirs = flat(ours), flat(theirs)
    return [
        f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in NOT_LEARNED and ours.get(name) != theirs.get(name)
    ]


def environment() -> dict[str, Any]:
    """Versions and commit that a run was made with."""
    import platform
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, Any] = {"python": platform.python_version()}
    ours = ("aligngpt", "torch", "transformers", "tokenizers", "safetensors", "pillow")
    for package in (*ours, "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        # Only if this very file is tracked: an installed package may lie inside somebody else's repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
        versions["commit"] = commit + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        versions["commit"] = None  # an installed package, or no git here
    return versions


def _first_sentence(preset: Callable[[Stage], TrainConfig]) -> str:
    return (preset.__doc__ or "").strip()
