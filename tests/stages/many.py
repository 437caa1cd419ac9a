"""Runs several scripts one after the other in one launch: starting processes takes longer than a tiny run.

usage: many.py '[["stages/stage1.py", "tiny-gemma", ...], ...]'
"""

import json
import runpy
import sys

from accelerate import Accelerator

from common.train import launch

if __name__ == "__main__":
    leave, launch.leave = launch.leave, lambda accelerator: None  # the processes go on with the next script
    for words in json.loads(sys.argv[1]):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    leave(Accelerator())
