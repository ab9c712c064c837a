"""Ways to compute a model's attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.nn.attention import SDPBackend, sdpa_kernel

EAGER, SDPA, OURS = "eager", "sdpa", "fa4_ext"


@dataclass(frozen=True)
class Contender:
    """A contender is entered around everything that its process does.

    Attributes:
        label: its name for people.
        implementation: transformers' attn_implementation.
        enter: makes the context in which the model is built and run.
    """

    label: str
    implementation: str
    enter: Callable[[], contextlib.AbstractContextManager]


def _only(backend: SDPBackend) -> Callable[[], contextlib.AbstractContextManager]:
    return lambda: sdpa_kernel([backend, SDPBackend.MATH])


@contextlib.contextmanager
def _imported() -> Iterator[None]:
    import fa4_ext  # noqa: F401 (registers)

    yield


@contextlib.contextmanager
def _integrated() -> Iterator[None]:
    from fa4_ext.integrations import transformers

    transformers.register(OURS)
    yield


# PyTorch's single backends may fall back to math: what that costs is theirs.
CONTENDERS = {
    "torch": Contender("torch's choice", SDPA, contextlib.nullcontext),
    "flash": Contender("torch's FA2", SDPA, _only(SDPBackend.FLASH_ATTENTION)),
    "cudnn": Contender("cuDNN", SDPA, _only(SDPBackend.CUDNN_ATTENTION)),
    "efficient": Contender("efficient", SDPA, _only(SDPBackend.EFFICIENT_ATTENTION)),
    "eager": Contender("transformers' eager", EAGER, contextlib.nullcontext),
    "import": Contender("import fa4_ext", SDPA, _imported),
    "fa4_ext": Contender('attn_implementation="fa4_ext"', OURS, _integrated),
}
MATH = Contender("math", SDPA, _only(SDPBackend.MATH))  # for correctness
