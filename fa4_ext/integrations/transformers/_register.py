"""This module registers the attention function and the mask function."""

from __future__ import annotations

import torch
import transformers

# The versions of transformers that the tests ran with.
TESTED_VERSIONS = ("5.24.0",)
_OLDEST = (5, 24)


def _require_version() -> None:
    """Raises the error for a version of transformers that cannot work.

    Raises:
        ImportError: transformers is older than any version that was tested.
    """
    version = transformers.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ImportError(
            f"fa4_ext's integration needs transformers {'.'.join(map(str, _OLDEST))} or newer, "
            f"found {version}; tested: {', '.join(TESTED_VERSIONS)}"
        )


_require_version()  # before the modules below import what older versions lack

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from fa4_ext.integrations.transformers.attention import attention  # noqa: E402
from fa4_ext.integrations.transformers.masks import make_mask  # noqa: E402
from fa4_ext.integrations.transformers.vision import join_vision_calls  # noqa: E402

__all__ = ["TESTED_VERSIONS", "join_vision_calls", "register"]


_mask_outside_graphs = torch.compiler.disable(
    make_mask, reason="fa4_ext describes the mask outside the graph"
)


def register(name: str = "fa4_ext", *, masks_in_graphs: bool = False) -> None:
    """Makes `attn_implementation=name` run attention on this library's kernels.

    Registering again changes nothing but `masks_in_graphs`.

    Args:
        name: the name of the implementation. It may be any that transformers does not know, without
            "flash" in it.
        masks_in_graphs: whether torch.compile traces how a model makes its mask. With False the
            graph breaks there, once a forward, and the kernels run as without torch.compile. With
            True fullgraph=True works, but nothing can be read from the device: padding, packed
            sequences and windows become dense masks, which transformers' sdpa runs, and so does a
            causal mask where the model passes positions on, since they may be those of packed
            sequences. Where `generate` makes the masks ahead of a compiled forward, the kernels
            run either way.

    Raises:
        ImportError: transformers is too old; raised by the import of this module.
        ValueError: transformers would take the name for something else.
    """
    if "flash" in name:
        raise ValueError(
            f"the name must not contain 'flash', is {name!r}: transformers takes such a name for "
            "flash-attn or for a kernel from the Hub, and loads that"
        )
    if "/" in name or "|" in name or "sdpa" in name or "flex_attention" in name:
        raise ValueError(
            f"the name must not contain '/', '|', 'sdpa' or 'flex_attention', is {name!r}: "
            "transformers reads a meaning of its own from it"
        )
    known = AttentionInterface._global_mapping.get(name)
    known_mask = AttentionMaskInterface._global_mapping.get(name)
    if known not in (None, attention) or known_mask not in (None, make_mask, _mask_outside_graphs):
        raise ValueError(f"transformers has an implementation {name!r} already")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, make_mask if masks_in_graphs else _mask_outside_graphs)
