"""What both entry points do: read the command line, set up messages, train, and turn a user's mistake into one line."""

import logging
import os
import signal
import sys
import time
from typing import Any

from training.config import Stage, is_first_on_machine, read_command_line


class Console(logging.StreamHandler[Any]):
    """Messages on standard error, each on a line of its own, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def run(stage: Stage) -> None:
    """Ends the process with status 1 and `error: …` for what a user can mend; anything else is a traceback.

    Those errors are the same in every process. Of the processes on a machine the first one speaks. The others hold
    still for a second before they end with it, because torchrun terminates the rest as soon as one is gone. Ctrl-C is
    one line likewise, and status 130.
    """
    try:
        config = read_command_line(stage)
        # Only now: the command line is answered without waiting for PyTorch.
        from transformers.utils import logging as transformers_logging

        from training.dry_run import dry_run
        from training.loop import train

        logging.basicConfig(
            level=logging.INFO if is_first_on_machine() else logging.ERROR,
            format="%(name)s: %(message)s",
            handlers=[Console()],
        )
        if not is_first_on_machine():
            transformers_logging.set_verbosity_error()
        if config.dry_run:
            dry_run(config, stage)
        else:
            train(config, stage)
    except ChildProcessError as error:  # this process alone knows; torchrun terminates the others
        print(f"error: {error} (--data.workers). The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # a thread may wait for ever for what the dead worker did not send
    except KeyboardInterrupt:
        if is_first_on_machine():
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        else:
            time.sleep(1)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, FloatingPointError, SystemExit) as error:
        if not is_first_on_machine():
            time.sleep(1)
        elif not isinstance(error, SystemExit):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code if isinstance(error, SystemExit) else 1)
