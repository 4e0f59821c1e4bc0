"""train.py, to which a signal is sent as one of its steps begins. It takes train.py's flags.

SIGNAL="TERM 6 1" in the environment: SIGTERM, where six steps are done, to the process of rank 1.
Once only: not again when torchrun has restarted it.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402

NAME, STEP, RANK = os.environ["SIGNAL"].split()
FIRST_START = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
do_step = train.train_step


def train_step(state, *rest):
    if FIRST_START and (state.step, train.RANK) == (int(STEP), int(RANK)):
        os.kill(os.getpid(), getattr(signal, f"SIG{NAME}"))
    return do_step(state, *rest)


train.train_step = train_step
if __name__ == "__main__":
    train.run_script(train.main)
