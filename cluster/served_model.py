"""What the gateway says of the model, read from its files without torch and without the weights."""

from __future__ import annotations

from cluster.messages import ModelInfo
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.gguf_file import GGUFFile
from engine.json_file import read_json_object
from engine.model_config import ModelConfig, from_gguf, from_hf
from engine.model_source import ModelFiles
from engine.tokenizer import Tokenizer


def served_name(model: str, files: ModelFiles) -> str:
    """The name by which clients, gateway and workers call the model: the same wherever its files lie."""
    if model == DEFAULT_MODEL:
        return model
    if files.hub_id:
        return files.hub_id
    return files.path.stem if files.kind == "gguf" else files.path.resolve().name


def describe(config: EngineConfig, files: ModelFiles, tokenizer: Tokenizer) -> ModelInfo:
    """Raises ModelFileError. `dtype` stays "auto" where it is left to the workers' devices."""
    name = served_name(config.model, files)
    model = _read_config(files, name)
    return ModelInfo(
        name=name,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        architecture=model.architecture,
        dtype=config.dtype,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=tokenizer.has_chat_template,
    )


def _read_config(files: ModelFiles, name: str) -> ModelConfig:
    if files.kind == "gguf":
        file = GGUFFile(files.path)
        return from_gguf(file.metadata, file.tensors, name)
    generation = files.path / "generation_config.json"
    return from_hf(
        read_json_object(files.path / "config.json"),
        name,
        read_json_object(generation) if generation.exists() else None,
    )
