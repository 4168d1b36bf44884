"""AlignGPT: a multimodal LLM whose sequence carries one token that says how well image and text are aligned.

Importing the package registers model, config and processor with transformers' Auto classes. Where transformers or what
it needs is missing or broken, the import still works, for what needs none of it; the three names then say what is wrong
when used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AlignGPTConfig", "AlignGPTForConditionalGeneration", "AlignGPTProcessor", "__version__"]

_problem: Exception | None = None  # why the three names can't be used, if they can't

if TYPE_CHECKING:
    from .config import AlignGPTConfig
    from .model import AlignGPTForConditionalGeneration
    from .processor import AlignGPTProcessor
else:
    try:
        # Other people's packages alone: an error of our own is never hidden here.
        import_module("transformers.models.llava.modeling_llava")  # the package alone imports lazily
        import_module("PIL.Image")
    except Exception as error:  # missing, or broken in any way: `aligngpt doctor` must still run, and explains
        _problem = error
        if getattr(error, "name", None) != "transformers":
            logging.getLogger(__name__).warning("only the ops work: %s: %s", type(error).__name__, error)

        def __getattr__(name: str) -> Any:
            if name not in __all__:
                raise AttributeError(f"module 'aligngpt' has no attribute {name!r}")
            needs = _problem.name if isinstance(_problem, ModuleNotFoundError) else f"packages that work ({_problem})"
            raise ImportError(
                f"aligngpt.{name} needs {needs}; install with: pip install 'aligngpt[train]' (aligngpt doctor explains)"
            ) from _problem

    else:
        import transformers

        from .config import AlignGPTConfig
        from .model import AlignGPTForConditionalGeneration, AlignGPTModel
        from .processor import AlignGPTProcessor

        transformers.AutoConfig.register("aligngpt", AlignGPTConfig, exist_ok=True)
        transformers.AutoModel.register(AlignGPTConfig, AlignGPTModel, exist_ok=True)
        transformers.AutoModelForImageTextToText.register(
            AlignGPTConfig, AlignGPTForConditionalGeneration, exist_ok=True
        )
        transformers.AutoProcessor.register(AlignGPTConfig, AlignGPTProcessor, exist_ok=True)
