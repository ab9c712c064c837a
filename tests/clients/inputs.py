"""Makes random inputs for small models, by the names of their forward's arguments.

What a name stands for differs between families: `input_features` has its frames last, or its mels.
So there are several candidates, and those count that transformers' own attention accepts.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
GRID = ((1, 4, 4), (1, 4, 8), (1, 8, 4))  # patches of images of different sizes
SAMPLES, FRAMES = 3200, 64
MOST_TRIES = 60  # of one model

Inputs = dict[str, Any]
# Each of the values that an argument of this name may have.
Maker = Callable[["_Sizes"], list[Any]]


class _Sizes:
    """The sizes of a model's inputs, as its configuration says."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self.model, self.config = model, model.config
        self.batch, self.length = batch, length

    def of(
        self, *names: str, default: Any = None, of_config: PreTrainedConfig | None = None
    ) -> Any:
        """Returns the first of these attributes that the configuration has, or a nested one."""
        config = self.config if of_config is None else of_config
        found = (vars(config).get(config.attribute_map.get(name, name)) for name in names)
        value = next((value for value in found if value is not None), None)
        for nested in vars(config).values():
            if value is None and isinstance(nested, PreTrainedConfig):
                value = self.of(*names, of_config=nested)
        return default if value is None else value

    @property
    def vision(self) -> PreTrainedConfig:
        """Returns the configuration of the images."""
        return self.of("vision_config", "backbone_config", default=self.config)

    @property
    def width(self) -> int:
        text = self.config.get_text_config()
        found = self.of("hidden_size", "d_model", "embed_dim", "n_embd", of_config=text)
        return found if isinstance(found, int) else 32

    def tokens(self, length: int | None = None) -> torch.Tensor:
        shape = self.batch, self.length if length is None else length
        return torch.randint(3, VOCABULARY // 2, shape)

    def image(self) -> tuple[int, int, int]:
        """Returns channels, height and width."""
        size = self.of("image_size", "img_size", default=32, of_config=self.vision)
        if isinstance(size, dict):
            size = size["height"], size["width"]
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return self.channels(), height, width

    def channels(self) -> int:
        names = "num_channels", "in_channels", "in_chans"
        return self.of(*names, default=3, of_config=self.vision)

    def mels(self) -> list[int]:
        """Returns what the number of features of a frame may be."""
        names = "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "mel_bins"
        mels = self.of(*names, default=8)
        others = "input_dim", "feature_projection_input_dim", "input_size"
        found = mels, *(self.of(name) for name in others), self.width, 7 * mels, 4 * mels
        return [size for size in dict.fromkeys(found) if isinstance(size, int)]

    def frames(self) -> int:
        audio = self.of("audio_config", default=self.config)
        positions = self.of("max_source_positions", of_config=audio)
        if positions and positions < 100:
            return 2 * positions
        return 4 * self.of("n_window", default=FRAMES // 4)


def _tokens(sizes: _Sizes) -> list[Any]:
    books = sizes.of("num_codebooks", "num_channels", "num_quantizers", default=2)
    shape = sizes.batch, sizes.length
    codes = torch.randint(3, 8, (*shape, books))
    return [sizes.tokens(), codes, codes.transpose(1, 2).contiguous(), sizes.tokens(8)]


def _decoder_tokens(sizes: _Sizes) -> list[Any]:
    books = sizes.of("num_codebooks", "num_channels", default=2)
    return [sizes.tokens(sizes.length - 2), torch.randint(3, 8, (sizes.batch, 6, books))]


def _pixels(sizes: _Sizes) -> list[Any]:
    channels, height, width = sizes.image()
    frames = sizes.of("num_frames", "frames_per_clip", default=2, of_config=sizes.vision)
    patch = sizes.of("patch_size", default=8, of_config=sizes.vision)
    patch = patch if isinstance(patch, int) else patch[-1]
    batch = sizes.batch
    return [
        torch.randn(batch, channels, height, width),
        torch.randn(batch, frames, channels, height, width),
        torch.randn(batch, 16, channels * patch**2),
        torch.randn(batch, channels, frames, height, width),
        torch.randn(1, channels, patch, batch * 16 * patch),
    ]


def _patches(sizes: _Sizes) -> list[Any]:
    """Returns images of different sizes as the patches that a vision tower takes."""
    size, depth = (sizes.of(name, default=1) for name in ("patch_size", "temporal_patch_size"))
    total, channels = sum(t * h * w for t, h, w in GRID), sizes.channels()
    flat = [torch.randn(total, channels * frames * size**2) for frames in (depth, 2)]
    merge = sizes.of("spatial_merge_size", default=1)
    merged = torch.randn(total, merge * size, merge * size, channels)
    return [*flat, torch.randn(total, channels, size, size), merged]


def _flattened(sizes: _Sizes) -> list[Any]:
    patches = _pixels(sizes)[2]
    places = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5))
    return [torch.cat([places.expand(sizes.batch, -1, -1), patches], -1)]


def _positions(sizes: _Sizes) -> list[Any]:
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    return [places.expand(sizes.batch, -1, -1)]


def _grid(sizes: _Sizes) -> list[Any]:
    return [torch.tensor(GRID)]


def _waves(sizes: _Sizes) -> list[Any]:
    wave = torch.randn(sizes.batch, SAMPLES)
    frames = sizes.of("max_length", default=FRAMES)
    return [wave, torch.randn(sizes.batch, frames, sizes.mels()[0]), wave[:, None]]


def _features(sizes: _Sizes) -> list[Any]:
    frames = sizes.frames()
    both = [(mels, frames) for mels in sizes.mels()]
    shapes = [shape for one in both for shape in (one, one[::-1])]
    semantic = SAMPLES // 320, 160  # beside waves
    found = [torch.randn(sizes.batch, *shape) for shape in (*shapes, (1, *both[0]), semantic)]
    return [*found, torch.randn(both[0][0], sizes.batch * frames)]


def _states(sizes: _Sizes) -> list[Any]:
    states = torch.randn(sizes.batch, sizes.length, sizes.width)
    features = sizes.of("input_size", default=sizes.width)
    return [states, states.flatten(0, 1), torch.randn(sizes.batch, FRAMES, features)]


def _states_of_two(sizes: _Sizes) -> torch.Tensor:
    """Returns the states of two layers side by side."""
    return torch.randn(sizes.batch, sizes.length, 2 * sizes.width)


def _latents(sizes: _Sizes) -> list[Any]:
    return [states.mT.contiguous() for states in _states(sizes)[:1]] + _states(sizes)


def _boxes(sizes: _Sizes) -> list[Any]:
    corners = torch.randint(0, 8, (sizes.batch, sizes.length, 2))
    return [torch.cat([corners, corners + 4], -1)]


def _series(sizes: _Sizes) -> list[Any]:
    length = sizes.of("context_length", "num_context", default=FRAMES)
    length += max(sizes.of("lags_sequence", default=[0]))
    channels = sizes.of("num_input_channels", "input_size", default=1)
    series = [torch.randn(sizes.batch, length, channels), torch.randn(sizes.batch, length)]
    return series[::-1] if sizes.of("lags_sequence") else series


def _sessions(sizes: _Sizes) -> list[Any]:
    """Returns a video in which the model has seen the first frame, with an object at a point."""
    defined = vars(sys.modules[type(sizes.model).__module__])
    make = next(found for name, found in defined.items() if name.endswith("InferenceSession"))
    if getattr(sizes.model, "vision_encoder", None) is None:  # sam3_video has words and features
        return []
    _, height, width = sizes.image()
    video = torch.randn(2, *sizes.image())
    session = make(video=video, video_height=height, video_width=width, dtype=torch.float32)
    point = {
        "point_coords": torch.full((1, 1, 1, 2), 8.0),
        "point_labels": torch.ones(1, 1, 1).int(),
    }
    session.add_point_inputs(session.obj_id_to_idx(1), 0, point)
    session.obj_with_new_inputs = [1]
    sizes.model(inference_session=session, frame_idx=0)
    return [session]


# Arguments that a model needs wherever it has them, and those that it gets where all others fail.
MAKERS: dict[str, Maker] = {
    "input_ids": _tokens,
    "decoder_input_ids": _decoder_tokens,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "pixel_values_images": _pixels,
    "input_values": _waves,
    "input_features": _features,
    "spectrogram": _features,
    "merge_sizes": lambda sizes: [torch.full((len(GRID),), 2)],
    "past_values_padding": lambda sizes: [torch.zeros_like(one) for one in _series(sizes)[1:]],
    "freq": lambda sizes: [torch.zeros(sizes.batch, 1, dtype=torch.long)],
    "latents": _latents,
    "feature_lens": lambda sizes: [torch.tensor([sizes.frames()] * sizes.batch)],
    "aftercnn_lens": lambda sizes: [torch.tensor([sizes.frames() // 2] * sizes.batch)],
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "target_sizes": lambda sizes: [torch.tensor([[4, 4]] * sizes.batch)],
    "past_values": _series,
    "past_observed_mask": lambda sizes: [torch.ones_like(one) for one in _series(sizes)],
    "past_time_features": lambda sizes: [torch.randn(*_series(sizes)[0].shape, 0)],
    "future_values": lambda sizes: [torch.randn(sizes.batch, sizes.of("prediction_length"))],
    "future_time_features": lambda sizes: [
        torch.randn(sizes.batch, sizes.of("prediction_length"), 0)
    ],
    "bbox": _boxes,
    "inference_session": _sessions,
    "frame_idx": lambda sizes: [1],
    "patch_embeds": lambda sizes: [torch.randn(sizes.batch, sizes.width, 4, 4)],
    "chunk_sample_lengths": lambda sizes: [torch.full((sizes.batch,), 160 * sizes.frames())],
    "mask": lambda sizes: [None],
    "tasks_input_ids": lambda sizes: [sizes.tokens()],
    "tasks_attention_mask": lambda sizes: [torch.ones(sizes.batch, sizes.length).long()],
    "classes_input_ids": lambda sizes: [sizes.tokens()],
    "classes_attention_mask": lambda sizes: [torch.ones(sizes.batch, sizes.length).long()],
    "classes_structure": lambda sizes: [torch.ones(sizes.batch).long()],
    "flattened_patches": _flattened,
    "pixel_position_ids": _positions,
    "image_position_ids": _positions,
    "pixel_attention_mask": lambda sizes: [torch.ones(sizes.batch, 16, dtype=torch.long)],
    "spatial_shapes": lambda sizes: [torch.tensor([[4, 4]] * sizes.batch)],
    "image_attention_mask": lambda sizes: [torch.ones(sizes.batch, sizes.length, 2)],
    "attention_mask": lambda sizes: [torch.ones(sizes.batch, sizes.length, dtype=torch.long)],
    "image_sizes": lambda sizes: [torch.tensor([sizes.image()[1:]] * sizes.batch)],
    "input_features_mask": lambda sizes: [torch.ones(sizes.batch, sizes.frames()).bool()],
}
_OF_STATES = (
    "inputs_embeds", "hidden_states", "query_embeds", "encoder_hidden_states", "context",
    "noise_embeds", "context_hidden_states", "decoder_inputs_embeds", "qformer_input_embeds",
)  # fmt: skip
MAKERS |= dict.fromkeys(_OF_STATES, _states)
MAKERS["context_hidden_states"] = lambda sizes: [*_states(sizes), _states_of_two(sizes)]


GRIDS = {"grid_thw", "image_grid_thw"}
PACKED = ("hidden_states", "pixel_values")
# What is given besides the arguments that are required, one after the other.
OPTIONAL = (
    (), ("input_ids",), ("attention_mask",), ("pixel_values",), ("input_features_mask",),
    ("flattened_patches",), ("input_ids", "pixel_values"),
    ("input_ids", "pixel_values", "image_attention_mask"),
    ("input_ids", "pixel_values", "attention_mask"), ("encoder_hidden_states",),
    ("inputs_embeds",), ("input_ids", "encoder_hidden_states"), ("pixel_values", "inputs_embeds"),
    ("inputs_embeds", "encoder_hidden_states"), ("input_ids", "input_features"),
    ("input_ids", "pixel_values", "image_sizes"), ("pixel_values", "image_position_ids"),
    ("input_ids", "flattened_patches"),
    ("input_ids", "input_values"), ("decoder_input_ids",), ("pixel_values", "decoder_input_ids"),
    ("decoder_inputs_embeds",), ("future_values", "future_time_features"),
    ("feature_lens", "aftercnn_lens"), ("image_grid_thw",), ("target_sizes",), ("image_sizes",),
    ("image_position_ids",), ("pixel_attention_mask", "spatial_shapes"), ("frame_idx",),
    ("pixel_values_videos",), ("input_ids", "input_values", "pixel_values_videos"),
)  # fmt: skip


def candidates(
    model: PreTrainedModel, batch: int, length: int, function: Callable | None = None
) -> Iterator[Inputs]:
    """Yields inputs that a function of the model, or its forward, may take, likely ones first."""
    sizes = _Sizes(model, batch, length)
    names = inspect.signature(function or model.forward).parameters
    needed = [
        name
        for name, parameter in names.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if function is None:
        main = model.main_input_name
        needed += main if isinstance(main, list) else [main]
        needed += ["bbox"]
        if model.config.is_encoder_decoder or "decoder_input_ids" in needed:
            needed += ["decoder_input_ids"]
    tries, seen = 0, set()
    for more in OPTIONAL:
        chosen = dict.fromkeys(name for name in [*needed, *more] if name in names)
        if not chosen or frozenset(chosen) in seen or not set(chosen) <= set(MAKERS):
            continue
        seen.add(frozenset(chosen))
        values = [MAKERS[name](sizes) for name in chosen]
        if GRIDS & set(chosen):
            packed = next(n for n, name in enumerate(chosen) if name in PACKED)
            values[packed] = _patches(sizes)
        for picked in itertools.product(*values):
            yield dict(zip(chosen, picked, strict=True))
            tries += 1
            if tries == MOST_TRIES:
                return


def accepted(
    model: PreTrainedModel, batch: int, length: int, function: Callable | None = None
) -> Inputs | None:
    """Returns the first of these inputs that do not make the function raise, or None."""
    for inputs in candidates(model, batch, length, function):
        try:
            (function or model)(**copy.deepcopy(inputs))  # a session changes
        except Exception:  # what the model takes is found out by trying
            continue
        return inputs
    return None


def with_images(model: PreTrainedModel, batch: int) -> Inputs | None:
    """Returns inputs of text and images, if the model takes such by the usual names.

    The text has as many tokens for images as there are features of images.
    """
    token = getattr(model.config, "image_token_id", None)
    get_features = getattr(model, "get_image_features", None)
    if not isinstance(token, int) or get_features is None:
        return None
    images = accepted(model, batch, 1, get_features)
    if images is None:
        return None
    found: Any = get_features(**images)
    found = getattr(found, "pooler_output", found)
    each = list(found) if isinstance(found, torch.Tensor | list | tuple) else []
    sizes = _Sizes(model, batch, 1)
    counts = [one.numel() // sizes.width for one in each if isinstance(one, torch.Tensor)]
    if len(counts) != batch:
        counts = [sum(counts) // batch] * batch
    tokens = sizes.tokens(max(counts) + 5)
    for row, count in zip(tokens, counts, strict=True):
        row[2 : 2 + count] = token
    inputs = {"input_ids": tokens, **images}
    names = inspect.signature(model.forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names:
            inputs[name] = (tokens == token).long()
    try:
        model(**inputs)
    except Exception:
        return None
    return inputs
