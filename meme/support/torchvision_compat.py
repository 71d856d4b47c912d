"""Lets torchvision import beside a CPU-only torch.

PyPI's torchvision is compiled for CUDA torch. Beside a CPU torch its compiled part does not load, so two operators that its
Python part refers to at import are undeclared, and ``import torchvision`` fails; clean-fid and ptflops fail with it. Declaring
the two schemas is enough: neither package calls them.
"""

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # kept alive: the declarations go with it


def make_torchvision_importable() -> None:
    """Import torchvision; where its compiled part is missing, declare the operators it needs first."""
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _library is not None:
            raise
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                _library.define(schema)
        import torchvision  # noqa: F401
