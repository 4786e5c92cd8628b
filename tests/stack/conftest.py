"""What other packages need before they can be imported; their warnings are theirs."""

import torch


def declare_torchvision() -> None:
    """Declare the operators that torchvision describes when it is imported.

    A build of torchvision for another build of torch does not load them, and can not be imported then.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in "nms", "qnms":
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


KEPT: list[torch.library.Library] = []
declare_torchvision()
