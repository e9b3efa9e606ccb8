"""Configuration of the cluster: how many workers, and where they and the gateway run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cluster.controller_config import ControllerConfig
from cluster.host_port import is_host_port

# Where clients of OpenAI's interface expect a server of one's own.
HTTP_PORT = 8000
Degree = Annotated[int, Field(ge=1, le=64)]


class ClusterConfig(BaseModel):
    """Workers, their place and their resources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: int = Field(1, ge=0, le=1024, description="Prefill workers. With 0, decode workers compute the prompts.")
    colocated: int = Field(
        0, ge=0, le=1024, description="Workers that compute the prompts of all that they decode, and no others."
    )
    decode: int = Field(1, ge=0, le=1024, description="Decode workers. 0 only where all workers are colocated.")
    prefill_parallel: tuple[Degree, Degree] | None = Field(
        None,
        description="[tensor, pipeline] parallel degree of prefill workers; null: the engine's.",
    )
    decode_parallel: tuple[Degree, Degree] | None = Field(
        None, description="The same of decode workers and colocated ones."
    )
    profile: str = Field(
        "",
        description="Device profile that predicts the workers' steps: a built-in name, or a file that `tandem profile` "
        "wrote. Empty: the built-in one of the device at hand.",
    )
    address: str = Field(
        "ray",
        description="ray: a local Ray, started for this service. HOST:PORT: an existing Ray cluster; auto: the one of "
        "this node. none: plain processes on this machine.",
    )
    grpc_host: str = Field(
        "",
        description="Where the gateway listens. Empty: 127.0.0.1, or on an existing Ray cluster this node's address. "
        "Without gateway.auth, listen only where everybody may use the service.",
    )
    grpc_port: int = Field(50051, ge=0, le=65535, description="The gateway's port; 0: any free one.")
    registry_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Where workers report to the gateway; 0: any free port. null: the one after grpc_port.",
    )
    http: bool = Field(True, description="Whether the gateway serves OpenAI's HTTP interface as well.")
    http_port: int | None = Field(
        None, ge=0, le=65535, description="Its port; 0: any free one. null: 8000, or any free one where grpc_port is 0."
    )
    cpus_per_worker: float = Field(1, ge=0, allow_inf_nan=False, description="CPUs of a worker's Ray bundle.")
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="GPUs of a worker's Ray bundle. null: one each where the cluster has that many, else a half, a "
        "third, and so on: as many as have to share one.",
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Ray's strategy for the workers' bundles."
    )
    prefill_nodes: dict[str, str] = Field(
        {},
        description="Labels of the Ray nodes that prefill workers may run on, as Ray's label selectors take them. "
        "Empty: any node.",
    )
    decode_nodes: dict[str, str] = Field({}, description="The same of decode workers and colocated ones.")
    pin_cpus: bool = Field(
        False,
        description="Bind the threads of each worker to CPUs of its own: an equal share of engine.cpus, or of all. For "
        "workers that are all on one machine.",
    )
    lease_s: float = Field(
        10.0,
        ge=1,
        allow_inf_nan=False,
        description="How long a peer that is gone, frozen or cut off may hold KV blocks and streams at most.",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="How often a worker that died is started again, in a row; one that lived ten minutes begins anew.",
    )
    start_timeout_s: float = Field(
        300, gt=0, allow_inf_nan=False, description="How long all workers together may take until they report."
    )
    drain_s: float = Field(
        20,
        gt=0,
        allow_inf_nan=False,
        description="How long a worker or gateway that is told to end lets running requests go on. A worker hands back "
        "what is not done by then, and others go on with it.",
    )
    step_limit_s: float = Field(
        120,
        ge=1,
        allow_inf_nan=False,
        description="A worker whose step takes longer than this, and twenty times as long as predicted, ends as hung, "
        "and is started again.",
    )

    controller: ControllerConfig = ControllerConfig()

    @field_validator("decode")
    @classmethod
    def _somebody_decodes(cls, value: int, others: ValidationInfo) -> int:
        if value == 0 and others.data.get("colocated", 0) == 0:
            raise ValueError("at least 1 where colocated is 0")
        if value == 0 and others.data.get("prefill", 0) > 0:
            raise ValueError("at least 1 where there are prefill workers: colocated ones compute their own prompts")
        return value

    @field_validator("address")
    @classmethod
    def _known_address(cls, value: str) -> str:
        if value not in ("ray", "none", "auto") and not is_host_port(value):
            raise ValueError("ray, none, auto, or HOST:PORT of an existing Ray cluster")
        return value

    @model_validator(mode="after")
    def _pinned_on_one_machine(self) -> ClusterConfig:
        if self.pin_cpus and self.is_remote:
            raise ValueError(
                "pin_cpus: got true, expected false on an existing Ray cluster: workers may share machines"
            )
        return self

    @model_validator(mode="after")
    def _nodes_of_a_cluster(self) -> ClusterConfig:
        if (self.prefill_nodes or self.decode_nodes) and not self.is_remote:
            raise ValueError(
                "prefill_nodes and decode_nodes: got labels, expected none where all workers are on one machine "
                f"(address: {self.address})"
            )
        return self

    @model_validator(mode="after")
    def _within_the_controllers_limits(self) -> ClusterConfig:
        controller = self.controller
        if not controller.enabled:
            return self
        if self.prefill_parallel != self.decode_parallel:
            raise ValueError(
                "controller.enabled: got true, expected false where prefill_parallel and decode_parallel differ: a "
                "worker that changes its role keeps its ranks"
            )
        if self.prefill_nodes != self.decode_nodes:
            raise ValueError(
                "controller.enabled: got true, expected false where prefill_nodes and decode_nodes differ: a worker "
                "that changes its role stays on its node"
            )
        for name, least in (("prefill", controller.min_prefill), ("decode", controller.min_decode)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"controller.min_{name}: got {least}, expected at most {name}, which is {getattr(self, name)}"
                )
        start = self.prefill + self.decode
        if controller.min_workers is not None and controller.min_workers > start:
            raise ValueError(
                f"controller.min_workers: got {controller.min_workers}, expected at most prefill + decode, {start}"
            )
        if controller.max_workers is not None and controller.max_workers < start:
            raise ValueError(
                f"controller.max_workers: got {controller.max_workers}, expected at least prefill + decode, {start}"
            )
        return self

    @property
    def reports_to_port(self) -> int:
        """`registry_port`, or what stands for it; 0 for any free one."""
        if self.registry_port is not None:
            return self.registry_port
        return self.grpc_port + 1 if 0 < self.grpc_port < 65535 else 0

    @property
    def http_listens_on(self) -> int:
        """`http_port`, or what stands for it; 0 for any free one."""
        if self.http_port is not None:
            return self.http_port
        return HTTP_PORT if self.grpc_port else 0

    def nodes_of(self, role: str) -> dict[str, str]:
        """Labels of the Ray nodes that workers of `role` start on."""
        return self.prefill_nodes if role == "prefill" else self.decode_nodes

    @property
    def is_remote(self) -> bool:
        """True when workers may run on other machines."""
        return self.address not in ("ray", "none")
