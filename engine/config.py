"""Configuration of one engine. A frozen value: nothing is ever written back into it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

DEFAULT_MODEL = "smollm2-135m-instruct"


class EngineConfig(BaseModel):
    """Weights, KV pool and device of one worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        DEFAULT_MODEL,
        description="The default model's name, a GGUF file, a Hugging Face folder, or a hub id.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and activations. auto: float32 on CPU, bfloat16 on GPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    weight_format: Literal["dense", "int8", "int4"] = Field(
        "dense", description="dense: matrices in dtype. int8, int4: quantised while loading, in groups of 32; CPU only."
    )
    kv_dtype: Literal["auto", "float8_e4m3"] = Field(
        "auto", description="Type of KV. auto: dtype. float8_e4m3: half of bfloat16's bytes, three bits of mantissa."
    )
    kernels: Literal["auto", "torch"] = Field(
        "auto", description="auto: the fastest that run on the device. torch: plain torch, to compare with."
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of a rank's forward pass; 0: torch's choice, shared by the ranks."
    )
    cpus: tuple[int, ...] = Field(
        (), description="CPUs that the threads of forward passes are bound to, one each; none: the system's choice."
    )
    graph_rows: int = Field(
        256, ge=0, le=4096, description="Largest decode batch that is recorded once and replayed; 0: none."
    )
    graph_chunks: tuple[int, ...] = Field(
        (256, 512, 1024, 2048), description="Prompt chunks, in tokens, that a GPU replays as recorded graphs."
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="Ranks that split every layer of a worker: processes, each with its own GPU."
    )
    pipeline_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="Stages that a worker's layers are split into, of tensor_parallel ranks each; for models that do "
        "not fit one node.",
    )
    block_size: int = Field(16, ge=1, le=256, description="Token slots in a KV block.")
    kv_cache_bytes: int = Field(
        512 << 20,
        ge=1,
        description="Memory for KV blocks of each rank; the number of blocks follows from it and the model's shape.",
    )
    prefix_cache: bool = Field(True, description="Keep the KV of finished prompts for requests that share a prefix.")
    layer_group: int = Field(5, ge=1, description="Layers whose KV is published together while prefill runs.")

    @property
    def parallel(self) -> tuple[int, int]:
        return self.tensor_parallel, self.pipeline_parallel

    @property
    def ranks(self) -> int:
        """Processes that make one worker."""
        return self.tensor_parallel * self.pipeline_parallel

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        # Then one of any two workers' block sizes divides the other: a shared prefix ends on both sides' boundaries.
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value
