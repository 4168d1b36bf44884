"""AlignGPT: a multimodal LLM whose sequence carries one token that says how well image and text are aligned.

Importing the package registers model, config and processor with transformers' Auto classes. Where transformers is not
installed the import still works, for what needs none of it; the three names then say what is missing when used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["AlignGPTConfig", "AlignGPTForConditionalGeneration", "AlignGPTProcessor", "__version__"]

if TYPE_CHECKING:
    from .config import AlignGPTConfig
    from .model import AlignGPTForConditionalGeneration
    from .processor import AlignGPTProcessor
else:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise

        def __getattr__(name: str) -> Any:
            if name not in __all__:
                raise AttributeError(f"module 'aligngpt' has no attribute {name!r}")
            raise ImportError(f"aligngpt.{name} needs transformers; install it with: pip install 'aligngpt[train]'")

    else:
        from .config import AlignGPTConfig
        from .model import AlignGPTForConditionalGeneration, AlignGPTModel
        from .processor import AlignGPTProcessor

        transformers.AutoConfig.register("aligngpt", AlignGPTConfig, exist_ok=True)
        transformers.AutoModel.register(AlignGPTConfig, AlignGPTModel, exist_ok=True)
        transformers.AutoModelForImageTextToText.register(
            AlignGPTConfig, AlignGPTForConditionalGeneration, exist_ok=True
        )
        transformers.AutoProcessor.register(AlignGPTConfig, AlignGPTProcessor, exist_ok=True)
