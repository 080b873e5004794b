"""One thread for torch: the tensors are small, and a second thread only waits on a busy machine. Property tests draw
the same examples each time, and none fails for being slow."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
