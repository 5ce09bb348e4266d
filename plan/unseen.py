"""A plan sees no GPU, also where there is one: whoever imports torch imports this before."""

import os
import sys

IS_ASKED_FOR = sys.argv[1:2] == ["plan"]  # python run.py plan
if IS_ASKED_FOR:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
