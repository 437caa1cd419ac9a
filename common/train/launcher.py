"""`accelerate launch`, with its flags, for people: what a process says of its mistake is the last word.

Run   python -m common.train.launcher --config_file accelerate_configs/ddp.yaml stages/stage1.py tiny-gemma
"""

import logging
import os
import signal
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common.console import clear_errors


def main() -> None:
    """Ends with the status of the process that failed; only a process that a signal ended is spoken for."""
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # a wall of lines, which tell that and not why a process failed
    try:
        with clear_errors():
            launch_command(launch_command_parser().parse_args())
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        guess = ", perhaps because the machine ran out of memory" if name == "SIGKILL" else ""
        print(f"error: process {rank} was ended by {name}{guess}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)


if __name__ == "__main__":
    main()
