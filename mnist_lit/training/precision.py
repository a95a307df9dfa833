"""The fastest precision that the hardware computes in."""

import torch

__all__ = ["native_precision"]


def native_precision(accelerator: str) -> str:
    """bf16 where the hardware has it, else what Lightning defaults to.

    Args:
        accelerator: The Trainer's: `auto`, `cpu`, `gpu`, …
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    # Older releases of torch cannot tell what a CPU has.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-mixed" if has_bf16 else "32-true"
