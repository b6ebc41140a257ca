"""The plug-in under `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config

log = logging.getLogger("flash_eplb.worker")

_PATIENCE = 3.0

_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


class _Process:
    """Stands for this process; what is tied to it runs when the interpreter ends."""


_process = _Process()


def register() -> None:
    """Install the hooks that the environment asks for; none with EPLB_ENABLED unset or false.

    vLLM swallows what a plug-in raises, so whatever is wrong is logged here.
    """
    if not any(name.upper().startswith("EPLB_") for name in os.environ):
        return
    from .config import load_cpu_patches
    from .logs import configure

    try:
        if load_cpu_patches():
            from ..loaders import cpu_patches

            cpu_patches.install()
    except Exception:
        configure("INFO")
        log.exception("EPLB_CPU_PATCHES: the patches do not fit this vLLM, which runs without them")
    _balance()


def _balance() -> None:
    """Install the hooks that balance, if all settings are right and ask for them."""
    from ..kernel_cache import notice
    from .logs import configure

    config = _settings()
    if config is None or not config.enabled:
        return
    configure(config.log_level)
    if text := notice():
        log.warning(text)
    _let_ray_copy()
    try:
        from . import ascend, vllm_state

        platforms = ascend.platforms()
        if name := ascend.left_out(platforms, os.environ.get("VLLM_PLUGINS")):
            log.error(
                "VLLM_PLUGINS=%s leaves out %r, the platform plug-in of vLLM-Ascend, so vLLM "
                "does not find its NPUs: add it to the list",
                os.environ["VLLM_PLUGINS"],
                name,
            )
        if platforms:
            ascend.install(config)  # its runner V1 needs nothing of vLLM's own EPLB
        vllm_state.install(config, bool(platforms))
        _sweep_at_exit(config.session)
    except Exception:
        log.exception("flash_eplb is off: it does not fit this vLLM, which serves on without it")


def _settings() -> Config | None:
    """The settings; None if any is wrong. All that is wrong is logged, names that are no setting
    and settings that are there twice too."""
    from .config import ConfigError, load_config, twice_set, unknown_variables
    from .logs import configure

    config, wrong = None, ""
    try:
        config = load_config()
    except ConfigError as error:
        wrong = str(error)
    odd = [f"{text}; unset the other" for text in twice_set()]
    if unknown := unknown_variables():
        names = ", ".join(unknown)
        odd.insert(0, f"{names}: no setting of flash_eplb, misspelt? see `eplb config`")
    if odd or wrong:
        configure(config.log_level if config else "INFO")
    for text in odd:
        log.warning(text)
    if wrong:
        log.error("flash_eplb is off: %s", wrong)
    return config


def _let_ray_copy() -> None:
    """Let vLLM give our variables to the workers that Ray starts, which do not inherit them."""
    from .config import PREFIX

    prefixes = [prefix.strip() for prefix in os.environ.get(_RAY_COPIES, "").split(",")]
    os.environ[_RAY_COPIES] = ",".join(dict.fromkeys(filter(None, (*prefixes, PREFIX))))


def _sweep_at_exit(session: str) -> None:
    """Remove what killed workers left when the engine's main process ends.

    Finalizers run in reverse order: made now, it runs after vLLM's own, which end the workers. A
    worker removes its own names; it does not wait for the others.
    """
    from ..ipc.session import sweep
    from .balanced import is_worker

    def finish() -> None:
        if not is_worker():
            sweep(session, _PATIENCE)

    weakref.finalize(_process, finish)
