"""The compiled extension (ffi/module.cc). It imports on a machine with no GPU and no driver."""

def registrations() -> dict[str, object]:
    """Custom-call target name -> capsule with the XLA FFI handler."""

def supported_head_dims() -> list[int]:
    """Of the forward kernels."""

def bwd_head_dims() -> list[int]:
    """Of the backward kernels."""

def kernels() -> list[str]:
    """Names of the compiled kernel configurations."""

def describe_plan(
    dtype: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    is_causal: bool,
    config: str = "",
    diagonal: int = 0,
) -> str:
    """The plan of a forward call as text; arguments as for fwd_workspace_bytes."""

def fwd_workspace_bytes(
    dtype: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    is_causal: bool,
    config: str = "",
    diagonal: int = 0,
) -> int:
    """Size of the forward's workspace result.

    `config` forces one of kernels(); `diagonal`: causal, query t sees keys s <= t + diagonal; 0
    where the call has a query_offset.
    """

def describe_bwd_plan(
    dtype: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    is_causal: bool,
    config: str = "",
    deterministic: bool = False,
) -> str:
    """The plan of a backward call as text; arguments as for bwd_workspace_bytes."""

def bwd_workspace_bytes(
    dtype: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    is_causal: bool,
    config: str = "",
    deterministic: bool = False,
) -> int:
    """Size of the backward's workspace result.

    `config` forces one of kernels(); `deterministic`: dQ is summed in a fixed order, too.
    """

def ffi_api_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI headers it was compiled against."""

def driver_version() -> int:
    """As cudaDriverGetVersion counts, 13000 for CUDA 13.0; 0 without a driver."""

def cuda_version() -> int:
    """Toolkit it was built with, in the same count."""
