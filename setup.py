"""Package metadata. The base install is what the fused ops need; all that trains or serves is an extra."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "aligngpt/__init__.py").read_text(encoding="utf-8"))
assert VERSION, "aligngpt/__init__.py states no __version__"

TRANSFORMERS = "transformers>=5.16.1,<6"  # the LLM, the CLIP tower, generate, Auto classes
TRAIN = [
    TRANSFORMERS,
    "accelerate>=1.1",  # transformers needs it for device_map and for building a model without its weights
    "safetensors>=0.5",  # exchange format of weights, read a slice at a time
    "sentencepiece>=0.2",  # Vicuna's and Llama-2's tokenizer.model
    "protobuf>=4",  # transformers needs it to convert tokenizer.model
    "pillow>=10",  # image decoding and resizing, the reference of every back-end
    "tqdm>=4.66",  # progress bars
    "pyarrow>=17",  # Parquet files of scores and levels
    "matplotlib>=3.9",  # pictures of levels and of data sets
    "peft>=0.18",  # low-rank adapters of the LLM in training
    "tyro>=0.9",  # every field of a training config on the command line
]

setup(
    name="aligngpt",
    version=VERSION.group(1),
    description="AlignGPT with fused kernels: alignment-level vision-language models, trained and served",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={
        "aligngpt_kernels": "kernels/aligngpt_kernels",
        "aligngpt": "aligngpt",
        "training": "training",
    },
    packages=["aligngpt_kernels", "aligngpt", "aligngpt.data", "aligngpt.evaluation", "training"],
    package_data={"aligngpt_kernels": ["py.typed", "measured.json"], "training": ["rates.json"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',  # the fused kernels; also compiles them ahead of time without a GPU
        "numpy>=1.26",  # torch needs it to exchange arrays; image arrays and files are NumPy's
    ],
    extras_require={
        "train": TRAIN,
        "dali": ["nvidia-dali-cuda130>=2.4"],  # image decoding in training: GPUs with CUDA 13, or none
        "dali-cu12": ["nvidia-dali-cuda120>=2.4"],  # the same for CUDA 12
        "flash": [
            "flash-attn>=2.8"
        ],  # a peer in benchmarks and an attention back-end; builds against the installed torch
        "xformers": ["xformers>=0.0.35"],  # a peer in benchmarks and an attention back-end
        "log": [
            "tensorboard>=2.15",  # --log.tensorboard: torch writes its files with it
            "wandb>=0.17",  # --log.wandb: curves on a server
        ],
        "web": [*TRAIN, "gradio>=6"],  # the page of aligngpt chat --web, and the server that it and the HTTP API run on
        "eval": [*TRAIN, "openpyxl>=3.1"],  # the spreadsheet that MMBench's server takes
        "lmms-eval": [
            *TRAIN,
            "lmms-eval==0.7.3",  # aligngpt/evaluation/lmms_eval.py is a model of it
            "filelock<4",  # lmms-eval patches a module that 4 no longer has
            "sentencepiece<0.2.2",  # lmms-eval wants protobuf 6, with which newer ones can't read a tokenizer.model
        ],
        "demo": TRAIN,
        "dev": [
            *TRAIN,
            "pytest>=8",  # runs tests/ and benchmarks/
            "pytest-xdist>=3.6",  # runs the files of tests/ on several cores
            "pytest-benchmark>=5",  # times benchmarks/
            "hypothesis>=6.100",  # property tests of the kernels' arithmetic
            "ruff==0.17.6",  # formatter and linter, pinned so that a check means the same everywhere
            "mypy==2.4.1",  # type checker, pinned likewise
            # decodes images in training; tested against PIL
            'nvidia-dali-cuda130>=2.4; platform_system == "Linux" and platform_machine == "x86_64"',
            "tensorboard>=2.15",  # what --log.tensorboard wrote is read back in tests
            "setuptools>=77",  # builds the wheel that tests/test_layers.py installs
            "gradio>=6",  # the page that tests/aligngpt/test_web.py looks at
            "selenium>=4.20",  # drives Chromium there
            "openpyxl>=3.1",  # reads that spreadsheet back in tests
            "gguf>=0.10",  # reads SmolLM2 from its PyPI package in docs/real-run.md
        ],
    },
    entry_points={
        "console_scripts": ["aligngpt = aligngpt.cli:main"],
        "lmms_eval.models": ["aligngpt = aligngpt.evaluation.lmms_eval:manifest"],  # lmms-eval --model aligngpt
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
