"""The console script `splitray`: heeds signals before it reads all that the commands stand on."""

from splitray.signals import heed_signals


def main() -> None:
    """Run the command that was typed."""
    heed_signals()
    from splitray.commands.cli import main as run

    run()
