"""Configuration: the `EPLB_*` environment variables, their ranges and where a value comes from."""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..ipc.names import check_session
from ..planners.policy import BUILT_IN, DEFAULT, GROUP

PREFIX = "EPLB_"


class ConfigError(ValueError):
    """One or more `EPLB_*` variables are wrong; the text lists all of them."""


class Config(BaseSettings):
    """All settings. A field `name` is read from the environment variable `EPLB_NAME`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    enabled: bool = Field(False, description="balance; otherwise no hook is installed")
    session: str = Field("default", description="tells two engines on one host apart")
    spawn_planner: bool = Field(False, description="EP rank 0 starts the planner itself")
    cpu_patches: bool = Field(
        False, description="patch vLLM's CPU build so that it runs expert parallelism"
    )
    policy: str = Field(
        DEFAULT,
        pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="name of the policy that decides placements",
    )
    episode_steps: int = Field(16, ge=1, le=4096, description="steps summed to one episode")
    heat_phase: str = Field(
        "all",
        pattern="^(all|prefill|decode)$",
        description="steps whose heat counts: all, those with prompt tokens, or those without",
    )
    window_episodes: int = Field(64, ge=2, le=1024, description="episodes that a plan looks at")
    min_episodes: int = Field(8, ge=2, le=1024, description="episodes before the first plan")
    plan_interval: int = Field(8, ge=1, le=4096, description="episodes between two plans")
    min_excess: float = Field(
        0.02, ge=0, le=100, description="layers with PAR - 1 below this are left alone"
    )
    min_gain: float = Field(
        0.01, ge=0, le=100, description="PAR that a layer's new placement must win at least"
    )
    max_moves: int = Field(0, ge=0, le=10**6, description="slots moved per plan at most; 0: no cap")
    max_layers: int = Field(
        0, ge=0, le=10**6, description="layers in which a plan moves experts, at most; 0: no cap"
    )
    effort: str = Field(
        "balanced",
        pattern="^(fast|balanced|thorough)$",
        description="how long FlashLB searches: fast, balanced or thorough",
    )
    routing: str = Field(
        "uniform",
        pattern="^(uniform|weighted)$",
        description="how FlashLB divides an expert's tokens among replicas: uniform or weighted",
    )
    planner_threads: int = Field(
        1, ge=1, le=256, description="threads that FlashLB spreads layers over"
    )
    ranks_per_node: int = Field(
        0,
        ge=0,
        le=4096,
        description="consecutive ranks that share a node, asked for experts first; 0: all ranks",
    )
    staging_rows: int = Field(
        0,
        ge=0,
        le=4096,
        description="experts on their way to a rank at once; 0: what 4 MiB hold, from 8 to 64",
    )
    vote_steps: int = Field(4, ge=1, le=1024, description="steps between two votes of the ranks")
    plan_timeout_steps: int = Field(
        2000, ge=1, le=10**7, description="steps after which a round that is not staged is aborted"
    )
    transfer_timeout: float = Field(
        60.0, ge=0.001, le=3600, description="seconds after which a transfer fails"
    )
    transport: str = Field(
        "auto",
        pattern="^(auto|gloo|nccl|hccl|ipc|engine)$",
        description="how experts travel: auto, gloo, nccl, hccl, ipc or engine (vLLM's "
        "communicator)",
    )
    verify: bool = Field(True, description="check each expert's digest before and after its way")
    patrol_steps: int = Field(
        64,
        ge=0,
        le=10**6,
        description="steps from one live expert whose digest is checked to the next; 0: never",
    )
    ring_steps: int = Field(256, ge=8, le=65536, description="steps that the heat ring holds")
    initial_placement: str = Field(
        "",
        description="expert map (JSON) that the planner brings a new engine to; empty: none",
    )
    save_placement: str = Field(
        "",
        description="expert map (JSON) that the planner writes after each plan; empty: none",
    )
    record: str = Field(
        "", description="folder that the planner records heat and plans in; empty: none"
    )
    record_mb: int = Field(
        1024, ge=1, le=10**7, description="MiB of a recording, the oldest of which is removed"
    )
    log_level: str = Field(
        "INFO",
        pattern="^(?i:DEBUG|INFO|WARNING|ERROR)$",
        description="DEBUG, INFO, WARNING or ERROR",
    )

    @property
    def bell_steps(self) -> int:
        """Steps from one bell to the next: an episode, or less where the ring would be overrun."""
        return min(self.episode_steps, self.ring_steps // 2)

    @field_validator("initial_placement", "save_placement", "record")
    @classmethod
    def _path(cls, value: str) -> str:
        """With the home folder for a `~`, which no shell has replaced in an environment file."""
        return os.path.expanduser(value)

    @field_validator("session")
    @classmethod
    def _session(cls, value: str) -> str:
        return check_session(value)

    @field_validator("log_level")
    @classmethod
    def _upper(cls, value: str) -> str:
        return value.upper()


def load_config(**overrides: Any) -> Config:
    """Read the environment; `overrides` (command-line options that are not None) win.

    Raises:
        ConfigError: all wrong values together: name, value, what is allowed.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Config(**given)
    except ValidationError as error:
        lines = [_complaint(item) for item in error.errors()]
        raise ConfigError("\n".join(["wrong settings:", *lines])) from None


class _CpuPatches(BaseSettings):
    model_config = Config.model_config

    cpu_patches: bool = False


def load_cpu_patches() -> bool:
    """Whether EPLB_CPU_PATCHES asks for the patches, be the other settings right or wrong."""
    try:
        return _CpuPatches().cpu_patches
    except ValidationError:
        return False


def _complaint(item: Any) -> str:
    name = str(item["loc"][0]).lower() if item["loc"] else "?"
    name = name.removeprefix(PREFIX.lower())
    return f"  {PREFIX}{name.upper()}={item['input']!r}: allowed is {allowed(name)}"


def allowed(name: str) -> str:
    """What values the setting `name` takes, in words."""
    if name == "session":
        return "1 to 32 letters, digits, '-' or '_'"
    if name == "log_level":
        return "DEBUG, INFO, WARNING or ERROR"
    if name == "heat_phase":
        return "all, prefill or decode"
    if name == "routing":
        return "uniform or weighted"
    if name == "transport":
        return "auto, gloo, nccl, hccl, ipc or engine"
    if name == "record":
        return "the path of a folder, or nothing"
    if name in ("initial_placement", "save_placement"):
        return "the path of a file, or nothing"
    if name == "effort":
        return "fast, balanced or thorough"
    if name == "policy":
        return f"{', '.join(BUILT_IN)} or the name of an entry point of {GROUP}"
    field = Config.model_fields[name]
    if field.annotation is bool:
        return "0 or 1"
    kind = "an integer" if field.annotation is int else "a number"
    low = high = ""
    for bound in field.metadata:
        low = f"from {bound.ge} " if hasattr(bound, "ge") else low
        high = f"to {bound.le}" if hasattr(bound, "le") else high
    return f"{kind} {low}{high}"


def source(name: str) -> str:
    """Where the effective value of setting `name` comes from."""
    found = _spellings().get(PREFIX + name.upper())
    return f"environment ({found[-1]})" if found else "default"


def _spellings() -> dict[str, list[str]]:
    """Variables of the environment by their upper case; the last one of each counts."""
    found: dict[str, list[str]] = {}
    for key in os.environ:
        found.setdefault(key.upper(), []).append(key)
    return found


def twice_set() -> list[str]:
    """What to say of settings that the environment has in two spellings, a sentence for each."""
    spellings = _spellings()
    settings = (PREFIX + name.upper() for name in Config.model_fields)
    several = (found for name in settings if len(found := spellings.get(name, [])) > 1)
    return [f"{' and '.join(found)} are one setting: {found[-1]} counts" for found in several]


def unknown_variables() -> list[str]:
    """`EPLB_*` variables in the environment that name no setting: probably misspelt."""
    known = {PREFIX + name.upper() for name in Config.model_fields}
    return sorted(
        key for key in os.environ if key.upper().startswith(PREFIX) and key.upper() not in known
    )
