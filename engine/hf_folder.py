"""A Hugging Face model folder: config.json, and tensors in one safetensors file or several with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelFileError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HFFolder:
    """Opened on construction, which reads config and tensor names. Raises ModelFileError for anything unsound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation = read_json(generation) if generation.exists() else None
        # safetensors maps the files; the handles live as long as this object.
        self._files: dict[str, Any] = {}
        self.tensors = self._find_tensors()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.tensors[name]).get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """The named tensor, in the type it is stored in."""
        tensor: torch.Tensor = self._open(self.tensors[name]).get_tensor(name)
        return tensor

    def _find_tensors(self) -> dict[str, str]:
        """Tensor name → file name."""
        index_path = self.path / INDEX_FILE
        if not index_path.exists():
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        index = read_json(index_path).get("weight_map")
        if not isinstance(index, dict):
            raise ModelFileError(index_path, "weight_map is missing")
        for name, file_name in index.items():
            # The index is input: a name such as "../../x" must not lead out of the folder.
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise ModelFileError(index_path, f"weight_map of {name} = {file_name!r}, expected a file name")
            if name not in self._open(file_name).keys():  # noqa: SIM118 - not a dict: it cannot be iterated
                raise ModelFileError(self.path / file_name, f"tensor {name} is missing, though the index names it here")
        return index

    def _open(self, file_name: str) -> Any:  # noqa: ANN401 - safetensors has no type stubs
        if file_name not in self._files:
            path = self.path / file_name
            if not path.is_file():
                raise ModelFileError(path, "does not exist")
            try:
                self._files[file_name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFileError(path, f"truncated or corrupt: {error}") from error
        return self._files[file_name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelFileError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(path, f"cannot be opened: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileError(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "expected a JSON object")
    return value
