"""What a training child is told of this machine. It starts nothing."""

from collections.abc import Mapping

from chassis.spawn import harmless_environment

_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "MKL_", "TRITON_", "XDG_")


def child_environment(environment: Mapping[str, str], *, threads: int, gpu_uuid: str) -> dict[str, str]:
    """No addresses, no credentials of the store, and that there is no hub to ask. `gpu_uuid` names the GPUs that the
    child sees, with commas; empty: none."""
    return harmless_environment(environment, _PREFIXES) | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": gpu_uuid,
    }
