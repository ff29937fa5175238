"""The `imprompt` command, also `python -m imprompt`. Signals are handled before anything large is imported."""

import sys

from imprompt.utils.signals import raise_on_signals, report_interrupt, restore_signals


def main() -> int:
    """Run the command line; its exit code."""
    try:
        raise_on_signals()
        from imprompt.cli import main as run

        return run()
    except KeyboardInterrupt as error:
        return report_interrupt(error)
    finally:
        restore_signals()


if __name__ == "__main__":
    sys.exit(main())
