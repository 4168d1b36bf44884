"""The rows of the table of stages, in the order of the work, and which file measures each by itself."""

TABLE = {
    "read + decode": "bench_images",
    "vision tower": "bench_tower",
    "projector": "bench_projector",
    "gate": "bench_gate",
    "injection": "bench_injection",
    "projector + gate + injection": "bench_chain",
    "LLM forward": "bench_llm",
    "loss": "bench_loss",
    "backward": "bench_llm",
    "optimizer": "bench_optimizer",
    "checkpoint": "bench_checkpoint",
    "prefill": "bench_prefill",
    "decode step": "bench_decode",
    "sampling": "bench_sampling",
    "training step": "bench_step",
    "answering": "bench_generate",
    "evaluation": "bench_evaluation",
}
