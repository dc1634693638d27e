"""Lets torchvision import beside a PyTorch without CUDA; `make sglang` installs it where there is no GPU.

PyPI's torchvision is built for CUDA: beside the CPU build its C++ library cannot load, and importing it
then fails because two of its operators were never declared. SGLang imports torchvision although a
language model needs none of it. Declared (without a body) before that import, they do not stand in its way.
"""

import importlib.abc
import importlib.metadata
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and "+cpu" not in importlib.metadata.version(name):
                library = torch.library.Library(name, "DEF")
                for operator in ("nms", "qnms"):
                    library.define(
                        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
                sys._torchvision_operators = library  # keeps the declaration alive
        return None


sys.meta_path.insert(0, DeclareOperators())
