"""Runs several scripts one after the other in one launch: starting processes takes longer than a tiny run.

usage: many.py '[["stages/stage1.py", "tiny-gemma", ...], ...]'
"""

import json
import runpy
import sys

from accelerate import Accelerator

if __name__ == "__main__":
    Accelerator.end_training = lambda self: None  # it would take the process group from the next script
    for words in json.loads(sys.argv[1]):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
