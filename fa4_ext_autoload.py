"""PyTorch calls `autoload` at the end of `import torch`, as an entry point of the group
torch.backends. It imports fa4_ext if the environment variable FA4_EXT_AUTOLOAD asks for it.

It runs in every process that imports torch, so it lies outside the package and costs next to
nothing where the variable is not set."""

import os

# the words of FA4_EXT_AUTOREGISTER
OFF, ON = ("0", "false", "no", "off"), ("1", "true", "yes", "on")


def autoload() -> None:
    """Imports fa4_ext, or warns why it does not. It raises nothing, because `import torch` would
    fail."""
    value = os.environ.get("FA4_EXT_AUTOLOAD", "")
    word = value.strip().lower()
    if not word or word in OFF:
        return
    if word not in ON:
        _warn(
            f"FA4_EXT_AUTOLOAD must be one of {', '.join(OFF)} or one of {', '.join(ON)}, is "
            f"{value!r}: fa4_ext is not imported."
        )
        return
    try:
        from fa4_ext.integrations import on_import

        on_import.arm()
    except Exception as error:
        _warn(f"FA4_EXT_AUTOLOAD={value} could not import fa4_ext: {error!r}")


def _warn(sentence: str) -> None:
    import contextlib
    import warnings

    with contextlib.suppress(Exception):  # where warnings are errors
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)
