"""Signals that ask for a stop, on which all ranks agree."""

import math
import os
import signal
import time

from training.distributed import agree_max


class Stopped(Exception):
    """A signal came before training began; nothing has been written."""

    def __init__(self, number: int):
        super().__init__(f'{signal.Signals(number).name}: stopped before '
                         'training began; nothing was written')
        self.number = number


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 ask for a stop with a checkpoint.

    A signal to one rank stops all of them at the same point. One that comes
    later than `SAME_REQUEST_S` after the first ends the process at once,
    without a checkpoint: before that it is the same request, made by a batch
    system to the processes and to torchrun, which passes it on.
    """

    SAME_REQUEST_S = 3.0

    def __init__(self):
        self.received, self._first_at = 0, math.inf
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number, _frame):
        now = time.monotonic()
        if now > self._first_at + self.SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.received:
            self.received, self._first_at = number, now
            # not print: the signal may have come in the midst of one
            os.write(2, f'\n{signal.Signals(number).name}: stopping in good '
                     'order; once more to stop at once\n'.encode())

    def agreed(self) -> int:
        """A signal that some rank has received, the same on all, or 0."""
        return agree_max(self.received)

    def check(self):
        """Raise Stopped on all ranks if one of them has received a signal."""
        number = self.agreed()
        if number:
            raise Stopped(number)


class _NoStop:
    """The same questions where nobody asks for a stop."""

    received = 0

    def agreed(self):
        return 0

    def check(self):
        pass


NO_STOP = _NoStop()
