"""The cost models by which a gateway judges its workers, made from the configuration alone: no worker is asked, and no
torch is loaded. Workers correct them by the scales in their reports."""

from __future__ import annotations

from pathlib import Path

from cluster.config import TandemConfig
from cluster.planning.cost_model import CostModel, predictor_for_worker
from cluster.registry import Role
from cluster.worker_config import worker_config
from engine.config import EngineConfig
from engine.gguf_file import GGUFFile
from engine.json_file import read_json_object
from engine.model_config import ModelConfig, from_gguf, from_hf
from engine.model_source import ModelFiles

# Where NVIDIA's driver says which devices there are.
DRIVER = Path("/proc/driver/nvidia/gpus")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1}


def role_cost(config: TandemConfig, files: ModelFiles, role: Role) -> CostModel:
    """Of a worker that starts in `role`. Raises ConfigError for a `cluster.profile` that is none, ModelFileError."""
    engine = worker_config(config, role).engine
    device = device_name(config)
    model = _model(files, engine.model)
    element_bytes = _element_bytes(engine, device)
    token_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * element_bytes
    return predictor_for_worker(
        config.cluster.profile,
        device,
        model,
        tp=engine.tensor_parallel,
        pp=engine.pipeline_parallel,
        kv_capacity=max(1, engine.kv_cache_bytes * engine.ranks // token_bytes),
        element_bytes=element_bytes,
    )


def device_name(config: TandemConfig, driver: Path = DRIVER) -> str:
    """What the workers' torch will call their device, as far as this machine can tell; "cpu", or "cuda" for a GPU that
    is elsewhere."""
    if config.engine.device == "cpu":
        return "cpu"
    for information in sorted(driver.glob("*/information")):
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return value.strip()
    return "cuda" if config.engine.device == "cuda" or config.cluster.is_remote else "cpu"


def _element_bytes(engine: EngineConfig, device: str) -> int:
    dtype = engine.dtype if engine.kv_dtype == "auto" else engine.kv_dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return ELEMENT_BYTES[dtype]


def _model(files: ModelFiles, name: str) -> ModelConfig:
    if files.kind == "gguf":
        file = GGUFFile(files.path)
        return from_gguf(file.metadata, file.tensors, name)
    return from_hf(read_json_object(files.path / "config.json"), name, None)
