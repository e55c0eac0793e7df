"""Entry point: quiet on Ctrl-C from the first import on."""

import os
import signal


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from robusteval.cli import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli()


if __name__ == "__main__":
    main()
