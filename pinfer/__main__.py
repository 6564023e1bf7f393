"""The ``pinfer`` command, also as ``python -m pinfer``."""

import signal


def main() -> None:
    """Import and run the command line. Ctrl-C during the imports ends the process without a traceback."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pinfer.cli.app import main as run

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
