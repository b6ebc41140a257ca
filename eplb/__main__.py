"""Where the command `eplb` begins: Ctrl-C ends it without a word while it is still being loaded."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point of the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as command

    signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
