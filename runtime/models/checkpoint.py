"""Hugging Face folders to decoders: config.json and one or several safetensors files. Pickle files are never opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.models.config import DecoderConfig, config_from_json
from runtime.models.decoder import Decoder
from runtime.models.families import read_weights
from sim.files import read_json_object

T = TypeVar("T")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_decoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The model in ``folder``.

    Raises ValueError, in one line, for a checkpoint that is missing, truncated, foreign or pickle-only.
    """
    config = load_config(folder)
    weights = read_weights(config, _Tensors(folder, device, dtype))
    return Decoder(config, weights)


def load_config(folder: Path) -> DecoderConfig:
    """Only the description of the model in ``folder``.

    Raises ValueError if there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint={str(folder)!r}, is no folder: give one with config.json and model.safetensors")
    path = folder / "config.json"
    return config_from_json(read_json_object(path), name=folder.resolve().name, source=str(path))


class _Tensors:
    """Tensors of a checkpoint by name, moved to the device one by one."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self._files = _file_of_each_tensor(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``name``; ValueError if the checkpoint lacks it or it has another shape."""
        if name not in self._files:
            raise ValueError(f"{self.folder}, tensor {name} is missing: not a checkpoint of this config.json's model")
        tensor = _checked(self._files[name], lambda path: _read_tensor(path, name))
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.folder}, tensor {name} is {tuple(tensor.shape)}, config.json asks for {shape}")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{self.folder}, tensor {name} is {tensor.dtype}, must be float16, bfloat16 or float32")
        return tensor.to(self.device, self.dtype)


def _file_of_each_tensor(folder: Path) -> dict[str, Path]:
    if (folder / _INDEX).is_file():
        names = read_json_object(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{folder / _INDEX}, has no weight_map: not the index of a checkpoint")
        return {name: folder / str(file) for name, file in names.items()}
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(_checked(folder / _SINGLE, _read_names), folder / _SINGLE)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ValueError(f"{folder}, holds pickle files only, which are not opened: convert them to {_SINGLE}")
    raise ValueError(f"{folder}, holds no {_SINGLE} nor {_INDEX}: give a checkpoint's folder")


def _checked(path: Path, read: Callable[[Path], T]) -> T:
    """``read(path)``; ValueError of one line where the file is missing, cut short or something else."""
    try:
        return read(path)
    except FileNotFoundError:
        raise ValueError(f"{path}, a part of the checkpoint, does not exist: copy it whole") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}, truncated or no safetensors file ({reason}): copy it again") from None


def _read_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
