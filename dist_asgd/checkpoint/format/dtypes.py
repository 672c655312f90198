"""Lists the dtypes of the tensors that a checkpoint may hold: one list, for saving and for loading."""

from __future__ import annotations

import torch

# Names of torch's dtypes that torch copies and saves. Some releases of torch lack some of them. The tests walk all
# dtypes of the installed torch: each is here, or is refused by a save.
_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("bits16", "bits8", "bits4x2", "bits2x4", "bits1x8"),
)
DTYPES: dict[str, torch.dtype] = {name: vars(torch)[name] for name in _NAMES if name in vars(torch)}
_STORED = frozenset(DTYPES.values())


def check_dtype(key: str, dtype: torch.dtype) -> None:
    """Raises ``TypeError`` for a dtype of which checkpoints hold no tensors; ``key`` names the tensor in the message.

    torch can neither copy nor save tensors of integers narrower than a byte (``torch.int4``, ``torch.uint7``). A
    quantized tensor is more than its elements: it has scales and zero points.
    """
    if dtype in _STORED:
        return
    is_quantized = str(dtype).startswith(("torch.qint", "torch.quint"))
    parts = "its int_repr(), scale and zero point" if is_quantized else "tensor.view(torch.uint8)"
    raise TypeError(f"{key} is a tensor of {dtype}, which checkpoints do not hold: give {parts} instead")
