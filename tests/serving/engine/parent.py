"""A program that never closes its dispatcher: ``python -m tests.serving.engine.parent [wait]``."""

import sys
import time

from serving.engine.dispatcher import Dispatcher
from serving.engine.spec import WorkerSpec
from tests.serving.engine.test_processes import worker_pid

if __name__ == "__main__":
    dispatcher = Dispatcher(WorkerSpec("", engine="tests.serving.engine.scripted:hanging_engine"))
    print(worker_pid(dispatcher), flush=True)
    if sys.argv[1:]:
        time.sleep(60)
